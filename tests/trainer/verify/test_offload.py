"""A whole run whose activations or moments lie on the host: the same losses, bit for bit, and its
setting reaches every block and every parameter."""

import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from parallel.activation_offload import ActivationOffload
from parallel.engines import base, optimizer_offload
from parallel.engines.optimizer_offload import OptimizerOffload
from tests.support.pool import ranks
from trainer import placement, stages
from trainer.config.compose import compose
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import EVALUATION, METRICS, read
from trainer.run_dir import make_run_dir
from trainer.verify.whole_runs import COMMON, write_documents


def in_rank(env, words, directory):
    """Bytes that left for the host, which is taken to be another place than the device; None if
    nothing was to leave."""
    made = []

    def to_host(device):
        made.append(
            ActivationOffload(device, lambda size: torch.from_numpy(np.empty(size, np.uint8)))
        )
        return made[-1]

    asked = compose(words)
    assert asked.config is not None and not asked.faults
    there, placement.ActivationOffload = placement.ActivationOffload, to_host
    try:
        whereabouts = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
        assert stages.run(asked.config, whereabouts, Path(directory)) == 0
    finally:
        placement.ActivationOffload = there
    return made[0].sent if made else None


@pytest.mark.full
def test_a_run_with_its_activations_on_the_host_has_the_same_losses(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    data = (
        "data=files",
        f"data.path={write_documents(tmp_path / 'text')}",
        f"data.cache={tmp_path / 'cache'}",
    )
    words = (
        *COMMON,
        *data,
        "steps=3",
        "parallel.context=2",
        "engine=fsdp",
        "engine.checkpointing=selective",
    )
    found = []
    for wish in ("false", "true"):
        directory = tmp_path / wish
        make_run_dir(directory)
        its = (*words, f"engine.offload_activations={wish}", f"run_dir={directory}")
        sent = ranks(2, in_rank, its, str(directory))
        assert all(each is None if wish == "false" else each > 0 for each in sent), sent
        found.append([(row["loss"], row["grad_norm"]) for row in read(directory / METRICS)])
    assert len(found[0]) == 3 and found[0] == found[1]


def with_moments_away(env, words, directory):
    """Takes a run whose moments, if it is to, lie in other memory; bytes that left for there."""
    made = []

    def to_host(device):
        made.append(OptimizerOffload(device, torch.empty_like))
        return made[-1]

    asked = compose(words)
    assert asked.config is not None and not asked.faults
    whereabouts = RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo")
    with (
        mock.patch.object(base, "OptimizerOffload", to_host),
        mock.patch.object(optimizer_offload, "SMALL", 64),
    ):
        assert stages.run(asked.config, whereabouts, Path(directory)) == 0
    return made[0].moved if made else None


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_goes_on_from_a_checkpoint_of_moments_on_the_host(size, tmp_path):
    data = f"data.path={write_documents(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"
    run = tmp_path / "run"
    make_run_dir(run)
    words = (*COMMON, "data=files", *data, "steps=4", "checkpoint.every=2", "evaluation.every=2")
    words += (f"parallel.context={size}", "engine.offload=optimizer", f"run_dir={run}")
    assert all(ranks(size, with_moments_away, words, str(run)))
    whole = told(run)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    assert all(ranks(size, with_moments_away, (*words, "resume=auto"), str(run)))
    assert told(run) == whole and [row[0] for row in whole[0]] == [1, 2, 3, 4]
    assert (run / "checkpoints" / "step_00000004").exists()


def told(run):
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in read(run / METRICS)]
    return steps, [(row["step"], row["name"], row["value"]) for row in read(run / EVALUATION)]


@pytest.mark.parametrize("words", [("log.lag=1",), ("optim=muon", "checkpoint.every=2")])
def test_a_run_with_its_moments_on_the_host_has_the_same_losses(words, tmp_path):
    data = f"data.path={write_documents(tmp_path / 'text')}", f"data.cache={tmp_path / 'cache'}"
    words = (*COMMON, "data=files", *data, *words, "steps=4", "parallel.context=3", "engine=fsdp")
    found = []
    for wish in ("none", "optimizer"):
        directory = tmp_path / wish
        make_run_dir(directory)
        its = (*words, f"engine.offload={wish}", f"run_dir={directory}")
        sent = ranks(3, with_moments_away, its, str(directory))
        assert all(each is None if wish == "none" else each > 0 for each in sent), sent
        found.append([(row["loss"], row["grad_norm"]) for row in read(directory / METRICS)])
    assert len(found[0]) == 4 and found[0] == found[1]
