"""Compiled blocks are kept unless they are slower, on all ranks alike; the trial has no trace."""

import io
import itertools
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import pytest
import torch

from parallel.compilation import CompiledForward
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer import compile_trial
from trainer.compile_trial import choose_compilation
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.stages import run


class Slow(CompiledForward):
    """A forward whose two forms take as long as they are told, on a clock of their own."""

    def __init__(self, eager_s, compiled_s):
        self.enabled = True
        self.seconds = (eager_s, compiled_s)
        self.now = 0.0

    def work(self):
        self.now += self.seconds[self.enabled]

    def clock(self):
        return self.now


def chosen(mesh, eager_s, compiled_s):
    block = Slow(eager_s, compiled_s)
    lines = []
    kept = choose_compilation([block], block.work, mesh, lines.append, clock=block.clock)
    assert block.enabled is kept
    return kept, lines


@pytest.mark.parametrize(
    "eager_s, compiled_s, kept", [(1.0, 0.5, True), (1.0, 1.019, True), (1.0, 1.03, False)]
)
def test_blocks_that_are_slower_by_more_than_two_percent_are_given_up(eager_s, compiled_s, kept):
    answer, (line,) = chosen(Mesh.alone(), eager_s, compiled_s)
    assert answer is kept
    assert ("given up" in line) is not kept


def on_a_rank(env, seconds):
    return chosen(build_mesh(env.size, 1), *seconds[env.rank])[0]


def test_the_slowest_rank_decides_for_all():
    # The ranks wait for one another: 1.0 s as written on the first, 1.2 s compiled on the last.
    assert ranks(3, on_a_rank, [(1.0, 0.5), (0.9, 0.9), (0.9, 1.2)]) == [False] * 3


def test_the_first_pass_which_compiles_does_not_count():
    block = Slow(1.0, 0.9)
    seconds = itertools.chain([5.0, 50.0], itertools.cycle([1.0, 0.9]))

    def work():
        block.now += next(seconds)

    assert choose_compilation([block], work, Mesh.alone(), print, clock=block.clock)


SETTINGS = (
    "steps=3",
    "model=switch",
    "model.width=16",
    "model.layers=2",
    "model.heads=2",
    "context_length=48",
    "batch_tokens=96",
    "memory=segments",
    "memory.length=20",
    "position=relative",
    "checkpoint.every=2",
    "evaluation.every=0",
    "precision=float64",
    "wandb.mode=disabled",
    "log.plots=false",
    "engine=fsdp",
    "parallel.context=2",
)


def run_here(env, words, directory):
    """The losses of a run on all ranks, and what it said; compiling is left out, measuring not."""
    config = load_config((*SETTINGS, *words, f"run_dir={directory}"), started=env.size)
    place = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    with (
        # Whatever was measured, the blocks serve as written, so that losses are the same bits.
        mock.patch.object(compile_trial, "SLOWER", 0.0),
        mock.patch.object(torch, "compile", lambda forward: forward),
        redirect_stdout(io.StringIO()) as said,
    ):
        assert run(config, place, Path(directory)) == 0
    return [row["loss"] for row in read(Path(directory) / METRICS)], said.getvalue()


def losses(directory, *words):
    make_run_dir(directory)
    return ranks(2, run_here, words, str(directory))[0]


@pytest.mark.full
def test_a_run_after_the_trial_is_the_run_without_it(tmp_path):
    plain, said = losses(tmp_path / "plain")
    assert "engine.compile:" not in said
    tried, said = losses(tmp_path / "tried", "engine.compile=true")
    assert tried == plain
    assert "they are given up for this run" in said
    # A run that goes on keeps the choice and measures nothing.
    _, said = losses(tmp_path / "tried", "engine.compile=true", "steps=5", "schedule.extend=hold")
    assert "resumed from" in said
    assert "engine.compile:" not in said
