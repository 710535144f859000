"""Runs with parallel.time: the figures of runs whose rows are whole; what has no such form."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pool import ranks
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.check import check_config
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.stages import run

SETTINGS = (
    "data=copy",
    "model=switch",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "context_length=47",
    "batch_tokens=94",
    "memory=segments",
    "memory.length=20",
    "position=relative",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "log.every=1",
    "checkpoint.every=0",
    "evaluation.every=0",
    "precision=float64",
    "wandb.mode=disabled",
    "log.plots=false",
)

SELECTIVE = ("engine.checkpointing=selective",)


def run_here(env: Any, config: Config, directory: str) -> list[dict]:
    """The figures of the steps of a run on all ranks."""
    place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    with redirect_stdout(io.StringIO()):
        assert run(config, place, Path(directory)) == 0
    return list(read(Path(directory) / METRICS))


def figures(size: int, directory: Path, *words: str) -> list[dict]:
    make_run_dir(directory)
    config = load_config((*SETTINGS, *words, f"run_dir={directory}"), started=size)
    return ranks(size, run_here, config, str(directory))[0]


@pytest.mark.parametrize("steps", [5, pytest.param(30, marks=pytest.mark.full)])
def test_a_run_in_pieces_has_the_figures_of_a_run_of_whole_rows(steps: int, tmp_path: Path):
    whole = figures(1, tmp_path / "whole", "engine=single", f"steps={steps}")
    assert len(whole) == steps and whole[-1]["loss"] < whole[0]["loss"]
    ways = {
        "alone": (1, "engine=single", "parallel.time=3", "engine.checkpointing=full"),
        "ranks": (2, "engine=fsdp", "parallel.time=5", "parallel.context=2", *SELECTIVE),
    }
    for name, (size, *words) in ways.items():
        cut = figures(size, tmp_path / name, *words, f"steps={steps}")
        assert len(cut) == len(whole)
        for ours, theirs in zip(cut, whole, strict=True):
            for key in ("loss", "grad_norm"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-9), (name, ours["step"], key)
            assert ours["auxiliary"] == pytest.approx(theirs["auxiliary"], rel=1e-9)
            assert ours["statistics"] == pytest.approx(theirs["statistics"], rel=1e-9)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mixer=prefix",), "sees later tokens"),
        (("mixer=bidirectional",), "sees later tokens"),
        (("memory=tokens", "memory.length=2"), "segments that begin with the row"),
        (("parallel.time=65",), "fewer than pieces"),
        (("mixer=rwkv7",), None),
        (("model=hyena",), None),
    ],
)
def test_what_has_no_such_form_is_refused_by_name(words: tuple[str, ...], said: str | None):
    rows = ("data=copy", "context_length=64", "batch_tokens=64", "parallel.time=3")
    asked = compose([*rows, *words])
    found = asked.faults
    if asked.config is not None:
        found = check_config(asked.config, asked.given, asked.mended, asked.faults)
    ours = [fault for fault in found if fault.startswith("parallel.time=")]
    assert bool(ours) == (said is not None), found
    for fault in ours:
        assert said is not None and said in fault and "; use parallel.time=" in fault
