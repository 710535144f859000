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


def test_moments_on_the_host_are_asked_of_the_host_and_not_of_a_gpu(memory, monkeypatch):
    monkeypatch.setattr(module, "machine_limits", lambda: (2, 2))
    # 13 million parameters: 50 MiB, as much of gradients, and 100 MiB of moments.
    large = ("model.width=512", "model.layers=4", "context_length=64", "parallel.data=2")
    away = (*large, "engine=fsdp", "engine.offload=optimizer")
    memory(1 << 30)
    monkeypatch.setattr(module, "gpu_bytes", lambda: 70 << 20)
    [finding] = findings(*large, "engine=fsdp")
    assert "gradients and optimiser on a rank, but there are 70.00 MiB of a GPU" in finding.fact
    assert findings(*away) == []
    monkeypatch.setattr(module, "gpu_bytes", lambda: 40 << 20)
    [finding] = findings(*away)
    assert "of parameters and gradients on a rank" in finding.fact
    monkeypatch.setattr(module, "gpu_bytes", lambda: 70 << 20)
    memory(80 << 20)
    [finding] = findings(*away)
    assert (finding.key, finding.value) == ("engine.offload", "optimizer")
    assert "2 ranks keep 49.52 MiB of" in finding.fact and "which has 80.00 MiB" in finding.fact
    assert "launch.force=true" in finding.remedy
