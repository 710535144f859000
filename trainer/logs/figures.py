"""Reads the final figures of a run from its directory."""

import math
from pathlib import Path
from statistics import median
from typing import NamedTuple

from trainer.logs.jsonl import EVALUATION, METRICS, read


class Figures(NamedTuple):
    """Final figures of a run; NaN for what is not known.

    Attributes:
        loss: the last training loss, nats per token.
        held_out_loss: the last held-out loss, nats per token.
        tokens_per_second: of the median step.
        peak_bytes: of the rank that uses most memory.
    """

    loss: float = math.nan
    held_out_loss: float = math.nan
    tokens_per_second: float = math.nan
    peak_bytes: float = math.nan


def read_figures(directory: Path) -> Figures:
    """Reads the figures of a run, however far it got."""
    rows = list(read(directory / METRICS))
    if not rows:
        return Figures()
    held_out_loss = math.nan
    for row in read(directory / EVALUATION):
        if row.get("name") == "held_out_loss":
            held_out_loss = _number(row.get("value"))
    # The first step also warms up, and is left out where there are others.
    timed_rows = rows[1:] or rows
    speeds = [_number(row.get("tokens_per_second")) for row in timed_rows]
    peaks = [_number(row.get("peak_memory_bytes")) for row in rows]
    loss = _number(rows[-1].get("loss"))
    return Figures(loss, held_out_loss, median(speeds), max(peaks))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
