"""Figures that lag a step change nothing but when they are read."""

import json
import re
from unittest import mock

import pytest
import torch

from tests.support.pool import ranks
from tests.trainer.test_plans_ahead import COMMON
from tests.trainer.test_stages import faults_of
from tests.trainer.verify.test_whole_runs import in_rank
from trainer.logs.jsonl import EVALUATION, METRICS, read
from trainer.loop import Loop
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import write_documents

SPOILT = 3  # the step whose loss is made infinite


def lagging(env, words, directory, fused):
    """Takes a run with a spoilt step; returns the order of launches and readings."""
    order = []
    launch, conclude, forward = Loop._launch, Loop._conclude, Loop._forward
    now = {}

    def launched(self, progress, given):
        now["step"] = progress.step + 1
        order.append(("launch", progress.step + 1))
        return launch(self, progress, given)

    def concluded(self, progress, step):
        if step is not None:
            order.append(("read", step.number))
        return conclude(self, progress, step)

    def spoilt(self, micro_batch):
        loss = forward(self, micro_batch)
        return loss * (torch.inf if now["step"] == SPOILT and env.rank == env.size - 1 else 1.0)

    plain = torch.optim.AdamW

    def made(groups, **settings):
        return plain(groups, **{**settings, "fused": fused})

    with (
        mock.patch.object(Loop, "_launch", launched),
        mock.patch.object(Loop, "_conclude", concluded),
        mock.patch.object(Loop, "_forward", spoilt),
        mock.patch.object(torch.optim, "AdamW", made),
    ):
        assert in_rank(env, words, directory) == 0
    return order


def went(folder, name, size, fused, *words):
    directory = folder / name
    make_run_dir(directory)
    data = f"data.path={write_documents(folder / 'text')}", f"data.cache={folder / 'cache'}"
    settings = (*COMMON, "model.heads=2", *data, *words, f"run_dir={directory}")
    orders = ranks(size, lagging, settings, str(directory), fused)
    rows = []
    for row in read(directory / METRICS):
        told = ("step", "loss", "grad_norm", "tokens", "learning_rate", "skipped")
        rows.append({key: row.get(key) for key in told})
    told = ("step", "name", "value", "tokens")
    held_out = [{key: row[key] for key in told} for row in read(directory / EVALUATION)]
    return orders, rows, held_out


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("engine", ["single", "fsdp"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_run_whose_figures_lag_is_the_run_that_waits(size, engine, fused, tmp_path):
    if size == 1 and engine == "fsdp":
        size = 2
    words = (f"parallel.context={size}", f"engine={engine}", "steps=8", "evaluation.every=5")
    words += ("checkpoint.every=6", "optim.max_skipped=3")
    _, *waits = went(tmp_path, "waits", size, fused, *words)
    orders, *lags = went(tmp_path, "lags", size, fused, *words, "log.lag=1")
    assert json.dumps(lags) == json.dumps(waits)
    assert [row["step"] for row in waits[0]] == list(range(1, 9))
    assert [row["step"] for row in waits[1]] == [5, 8]
    assert waits[0][SPOILT - 1]["skipped"] and not waits[0][SPOILT]["skipped"]
    # behind an evaluation, a checkpoint and the last step nothing is left to read
    expected = []
    for step in range(1, 9):
        expected.append(("launch", step))
        if step - 1 not in (0, 5, 6):
            expected.append(("read", step - 1))
        if step in (5, 6, 8):
            expected.append(("read", step))
    assert orders == [expected] * size


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("optim=muon", "for optim=adamw alone, and here is Muon; use log.lag=0 or optim=adamw"),
        ("optim.skip_above=4", "optim.skip_above=4 compares .*; use log.lag=0 or optim.skip_above"),
        (
            "engine=deepspeed precision=float32",
            "engine=deepspeed decides .*; use log.lag=0, or engine=fsdp",
        ),
        ("memory=segments", "memory=segments takes back .*; use log.lag=0, or memory=none"),
    ],
)
def test_who_must_know_figures_before_the_next_step_is_refused(words, said):
    faults = faults_of("log.lag=1", *words.split())
    assert [bool(re.search(f"^log.lag=1: .*{said}", fault)) for fault in faults] == [True], faults
