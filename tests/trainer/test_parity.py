"""A whole run gives the same losses however it is spread over ranks."""

import os
from pathlib import Path

import pytest
import torch

from parallel.launch import Ranks
from tests.pool import ranks
from trainer.directory import make
from trainer.parity import TOLERANCES, compare
from trainer.prepare import wish
from trainer.run import run


def in_rank(env, words, directory):
    config = wish(words, started=env.size)
    return run(config, Ranks(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo"), Path(directory))


def in_pool(words, size, directory):
    make(directory)
    assert ranks(size, in_rank, words, str(directory)) == [0] * size


@pytest.mark.slow
@pytest.mark.parametrize("precision", TOLERANCES)
def test_every_way_of_spreading_a_run_gives_the_same_losses(precision, tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    found = compare(in_pool, tmp_path, precision)
    assert found[0][1] == 0.0
    wrong = [(case, error) for case, error in found if not error < TOLERANCES[precision]]
    assert not wrong, f"differ from one device: {wrong}"
