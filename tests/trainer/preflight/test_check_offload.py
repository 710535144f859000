"""Moments lie on the host only where an accelerator computes, under engines and optimisers that
can."""

import pytest

from tests.trainer.preflight.test_check import faults, limit_machine

WRONG = [
    (
        "engine=fsdp engine.offload=optimizer",
        ["engine.offload=optimizer", "host's memory already", "engine.offload=none"],
    ),
    (
        "launch=slurm launch.dry_run=true launch.gpus=0 engine.offload=optimizer",
        ["engine.offload=optimizer", "host's memory already"],
    ),
    (
        "engine=fsdp engine.offload=parameters",
        ["engine.offload=parameters", "not offered", "engine=deepspeed"],
    ),
    (
        "launch=slurm launch.dry_run=true engine=single engine.offload=optimizer"
        " optim._target_=examples.own.optimiser.Lion",
        ["engine.offload=optimizer", "one after another, and Lion", "optim=muon"],
    ),
]


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_who_cannot_have_moments_on_the_host_is_told_in_one_message(words, said):
    [fault] = faults(*words.split())
    assert all(each in fault for each in said), fault


@pytest.mark.parametrize("engine", ["single", "fsdp"])
def test_moments_lie_on_the_host_where_there_is_an_accelerator(engine, monkeypatch):
    words = f"engine={engine}", "engine.offload=optimizer"
    assert faults(*words, "launch=slurm", "launch.dry_run=true") == []
    limit_machine(monkeypatch, 2, 1)
    assert faults(*words) == []
