"""A whole run gives the same losses however it is spread over ranks."""

import os
from pathlib import Path

import pytest
import torch

from tests.support.pool import ranks
from trainer.launch.elastic import RankInfo
from trainer.preflight.prepare import load_config
from trainer.run_dir import make_run_dir
from trainer.stages import run
from trainer.verify.whole_runs import PLANS, REFERENCE, compare


def in_rank(env, words, directory):
    return as_composed(env, load_config(words, started=env.size), directory)


def as_composed(env, config, directory):
    return run(
        config,
        RankInfo(env.rank, env.size, env.rank, env.size, torch.device("cpu"), "gloo"),
        Path(directory),
    )


def in_pool(words, size, directory):
    make_run_dir(directory)
    config = load_config(words, started=size)  # once, for all ranks: it takes longer than a step
    assert ranks(size, as_composed, config, str(directory)) == [0] * size


def some(name, many):
    """The truth, and `many` of the other ways, evenly from all."""
    first, *others = PLANS[name].cases
    return (first, *(others[heartbeat * len(others) // many] for heartbeat in range(many)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, many, steps",
    [
        pytest.param("float32", 1, 5, marks=pytest.mark.full),
        ("float64", 3, 4),
        *(
            pytest.param(name, None, None, marks=pytest.mark.full)
            for name in ("float32", "float64")
        ),
    ],
)
def test_every_way_of_spreading_a_run_gives_the_same_losses(name, many, steps, tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    cases = some(name, many) if many else None
    found = compare(in_pool, tmp_path, name, cases=cases, steps=steps)
    assert len(found) == (1 + many if many else len(PLANS[name].cases))
    assert found[0][1] == 0.0
    wrong = [(case, error) for case, error in found if not error < PLANS[name].tolerance]
    assert not wrong, f"differ from one device: {wrong}"


def spread(engine, context, micro):
    return (
        *engine.split(),
        f"parallel.context={context}",
        f"parallel.data={2 // context}",
        f"parallel.micro_batch={micro}",
    )


@pytest.mark.full
@pytest.mark.slow
def test_deepspeed_gives_the_losses_and_norms_of_one_device_at_every_stage(tmp_path):
    os.environ["HF_HUB_OFFLINE"] = "1"
    ways = ((0, 2, 1), (1, 1, 1), (2, 2, "auto"), (3, 2, 1))
    cases = [
        spread(f"engine=deepspeed engine.zero_stage={zero}", context, micro)
        for zero, context, micro in ways
    ]
    assert set(cases) <= set(PLANS["engines"].cases)
    found = compare(in_pool, tmp_path, "engines", cases=(REFERENCE, *cases), steps=3)
    assert all(error < PLANS["engines"].tolerance for _, error in found[1:]), found
