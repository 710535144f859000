"""A whole run whose activations wait on the host: the same losses, bit for bit, and its setting
reaches every block."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from parallel.activation_offload import ActivationOffload
from tests.support.pool import ranks
from trainer import placement, stages
from trainer.config.compose import compose
from trainer.launch.elastic import RankInfo
from trainer.logs.jsonl import METRICS, read
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
