"""What lies on the host is planned as ActivationOffload and OptimizerOffload move it there."""

import weakref

import pytest
import torch

from parallel.activation_offload import ActivationOffload
from parallel.engines.optimizer_offload import SMALL, OptimizerOffload
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
)
AWAY = "engine.offload_activations=true"


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
    config = compose([*SIZES, AWAY, f"engine.checkpointing={checkpointing}"]).config
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


def test_moments_on_the_host_are_planned_as_they_lie_there():
    sizes = [*SIZES, "model.width=256"]
    peaks = {}
    for offload in ("none", "optimizer"):
        config = compose([*sizes, f"engine.offload={offload}"]).config
        assert config is not None
        with torch.device("meta"):
            model = build_model(config, WORDS)
        rooms = Rooms()

        def allocate(tensor, rooms=rooms):
            return rooms.allocate(tensor.nbytes).view(tensor.dtype).view(tensor.shape)

        cpu = torch.device("cpu")
        moments = OptimizerOffload(cpu, allocate)
        step = measure_step(config, Mesh.alone(cpu), model, optimizer_offload=moments)
        plan = plan_step(config, WORDS, 0, read_device("cpu"))
        assert plan.host_bytes == rooms.held
        assert plan.peak_bytes == pytest.approx(step.peak_bytes, rel=0.1)
        peaks[offload] = plan.peak_bytes
        copies = plan.costs.seconds["copies to the host and back"]
        # Both moments go and come.
        assert copies >= 2 * rooms.held / read_device("cpu").host
        assert bool(copies) == (offload == "optimizer")
    assert peaks["none"] - peaks["optimizer"] == pytest.approx(rooms.held, rel=0.05)


def test_pinned_moments_take_powers_of_two_also_where_layers_are_planned_by_two_of_them():
    words = [*SIZES, "model.width=96", "model.layers=9", "engine.offload=optimizer"]
    config = compose(words).config
    assert config is not None
    with torch.device("meta"):
        model = build_model(config, WORDS)
    rooms = [4 * parameter.numel() for parameter in model.parameters()]
    expected = sum(2 * 2 ** (size - 1).bit_length() for size in rooms if size >= SMALL)
    card = read_device("h100")
    plans = [plan_step(config, WORDS, 0, card, every_layer=every) for every in (True, False)]
    assert [plan.host_bytes for plan in plans] == [expected] * 2
    assert plans[0].peak_bytes == plans[1].peak_bytes
    assert plans[0].costs.total_seconds == pytest.approx(plans[1].costs.total_seconds)
