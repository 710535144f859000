"""A config that cannot fit into the memory at hand is refused before ranks start."""

import pytest
import torch

from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.preflight import check_memory as module
from trainer.preflight.check_memory import check_memory

SIZES = (
    "model.width=32",
    "model.layers=2",
    "model.heads=2",
    "context_length=4096",
    "batch_tokens=8192",
    "parallel.micro_batch=1",
)


def findings(*words):
    config = compose([*SIZES, *words]).config
    assert config is not None
    with torch.device("meta"):
        model = build_model(config, 257)
    return list(check_memory(config, model))


@pytest.fixture
def memory(monkeypatch):
    def has(size):
        monkeypatch.setattr(module, "host_memory_bytes", lambda: size)

    return has


def test_a_context_whose_activations_do_not_fit_is_refused_with_what_they_take(memory):
    memory(8 << 20)
    [finding] = findings()
    assert finding.key == "context_length" and finding.value == 4096
    assert "MiB of activations" in finding.fact and "8.00 MiB for each rank" in finding.fact
    assert "launch.force=true" in finding.remedy


@pytest.mark.parametrize(
    "words",
    [
        ("context_length=64",),
        ("launch.force=true",),
        ("launch=slurm",),
        ("engine.tile_tokens=64", "parallel.time=64"),
    ],
)
def test_what_could_fit_or_is_forced_is_not_refused(memory, words):
    memory(8 << 20)
    assert findings(*words) == []


def test_ranks_of_a_machine_divide_its_memory(memory):
    memory(32 << 20)
    assert findings() == []
    assert findings("parallel.data=2", "engine=single") != []


def test_a_small_step_is_not_traced(memory, monkeypatch):
    memory(1 << 40)
    monkeypatch.setattr(module, "activation_bytes", None)
    assert findings() == []


def test_the_memory_of_a_gpu_is_that_of_the_smallest(monkeypatch):
    module.gpu_bytes.cache_clear()
    monkeypatch.setattr(module, "ASK", ("printf", "81559\\n143771\\n"))
    assert module.gpu_bytes() == 81559 << 20
    module.gpu_bytes.cache_clear()
    monkeypatch.setattr(module, "ASK", ("no-such-tool",))
    assert module.gpu_bytes() is None
    module.gpu_bytes.cache_clear()
