"""Reads the figures of a finished run from its directory."""

import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

from trainer.logs.jsonl import EVALUATION, METRICS, read


class Figures(NamedTuple):
    """What a run came to: the last loss and held-out loss, tokens a second of its middle step, most
    bytes on one rank."""

    loss: float = math.nan
    held_out_loss: float = math.nan
    tokens_per_second: float = math.nan
    peak_bytes: float = math.nan


def read_figures(directory: Path) -> Figures:
    """As far as the run has got."""
    rows = list(read(directory / METRICS))
    held_out = [
        row.get("value")
        for row in read(directory / EVALUATION)
        if row.get("name") == "held_out_loss"
    ]
    if not rows:
        return Figures()
    speeds = [
        row.get("tokens_per_second") for row in rows[1:] or rows
    ]  # the first step also warms up
    return Figures(
        _number(rows[-1].get("loss")),
        _number(held_out[-1]) if held_out else math.nan,
        median(map(_number, speeds)),
        max(_number(row.get("peak_memory_bytes")) for row in rows),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
