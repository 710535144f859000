"""Activations that wait on the host are planned as ActivationOffload moves them."""

import weakref

import pytest
import torch

from parallel.activation_offload import ActivationOffload
from parallel.mesh import Mesh
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.planning.devices import read_device
from trainer.planning.measured_step import measure_step
from trainer.planning.step_plan import plan_step

WORDS = 257
SIZES = (
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "context_length=192",
    "batch_tokens=192",
    "engine=single",
    "engine.offload_activations=true",
)


class Rooms:
    """Memory that the profiler does not see, as that of another device; counts what is held."""

    def __init__(self):
        self.held = 0
        self.most = 0

    def allocate(self, size):
        buffer = bytearray(size)
        room = torch.frombuffer(buffer, dtype=torch.uint8)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(room.untyped_storage(), self.free, size)
        return room

    def free(self, size):
        self.held -= size


@pytest.mark.short("full")
@pytest.mark.parametrize("checkpointing", ["full", "none"])
def test_what_waits_on_the_host_is_what_a_real_step_sends_there(checkpointing):
    config = compose([*SIZES, f"engine.checkpointing={checkpointing}"]).config
    assert config is not None
    with torch.device("meta"):
        model = build_model(config, WORDS)
    rooms = Rooms()
    offload = ActivationOffload(torch.device("cpu"), rooms.allocate)
    step = measure_step(config, Mesh.alone(torch.device("cpu")), model, offload)
    plan = plan_step(config, WORDS, 0, read_device("cpu"))
    assert plan.host_bytes == rooms.most > 0
    assert plan.peak_bytes == pytest.approx(step.peak_bytes, rel=0.1)
    assert plan.costs.seconds["copies to the host and back"] > 0
