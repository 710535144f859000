"""Moments on the host: the same bits as without, one parameter's on the device at a time."""

from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from parallel.engines import optimizer_offload
from parallel.engines.materialize import local_tensor
from parallel.engines.optimizer_offload import OptimizerOffload, empty_moment
from parallel.engines.single import Single
from parallel.mesh import Mesh, build_mesh
from tests.parallel.engines.test_state import everything
from tests.support import small_model
from tests.support.card import NAME, card_pool, the_card
from tests.support.pool import ranks
from tests.support.small_model import ENGINES, on_meta, train, whole
from trainer.optim.adamw import AdamW
from trainer.optim.muon import Muon

COUNT = 6
LEAST = 5  # bytes; what is moved here, for the model is small; counts of steps are less
HOST = torch.device("cpu")
OPTIMISERS = {
    "adamw": AdamW(learning_rate=1e-2, weight_decay=0.1),
    "muon": Muon(learning_rate=1e-2, weight_decay=0.1),
}


class Watched(OptimizerOffload):
    """Takes other memory of the CPU for the host's, and looks where moments lie at each update."""

    def __init__(self):
        super().__init__(HOST, torch.empty_like)
        self.updated: list[int] = []

    def build(self, build):
        optimiser = super().build(build)
        update = optimiser.step

        def step():
            away = {id(room) for room in self.rooms.values()}
            for parameter, state in optimiser.state.items():
                here = {key for key, value in state.items() if id(value) not in away}
                moments = {key for key in state if (id(parameter), key) in self.rooms}
                under = any(parameter is p for g in optimiser.param_groups for p in g["params"])
                assert here & moments == (moments if under else set())
            self.updated.append(sum(len(group["params"]) for group in optimiser.param_groups))
            return update()

        optimiser.step = step
        return optimiser


def engine_with(name, size, optim, offload, **settings):
    mesh = Mesh.alone() if size == 0 else build_mesh(1, size)
    settings = {"precision": "float64", "seed": 3, **settings}
    engine = ENGINES[name](mesh, OPTIMISERS[optim], **settings, offload=offload)
    engine.optimizer_offload = Watched() if offload == "optimizer" else None
    # A real run would keep the small model's moments where they are.
    with mock.patch.object(optimizer_offload, "SMALL", LEAST):
        engine.wrap(on_meta())
    # Moments are made where they stay: all of them at once the device might not hold.
    assert offload == "none" or engine.optimizer_offload.moved == 0
    return engine


def both(env, name, optim, settings):
    """Trains with and without; returns weights, norms and state of each."""
    found = []
    for offload in ("none", "optimizer"):
        engine = engine_with(name, env.size, optim, offload, **settings)
        with mock.patch.object(optimizer_offload, "SMALL", LEAST):
            norms = train(engine, 0, 3, COUNT, 2)
        found.append((whole(engine), norms, everything(engine)))
    mover = engine.optimizer_offload
    sizes = [local_tensor(value).nbytes for value in large(engine)]
    assert {id(value) for value in large(engine)} == {id(room) for room in mover.rooms.values()}
    assert mover.moved == 3 * sum(sizes) > 0
    assert mover.updated == [1] * 3 * len(engine.parameters)
    return found


def large(engine):
    return [value for value in engine.moments().values() if local_tensor(value).nbytes >= LEAST]


@pytest.mark.parametrize("optim", [*OPTIMISERS])
@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("single", 1, {}),
        ("single", 2, {"precision": "bfloat16"}),
        ("fsdp", 2, {}),
        ("fsdp", 3, {"precision": "bfloat16"}),
    ],
)
def test_training_is_the_same_to_the_last_bit(name, size, settings, optim):
    for plain, offloaded in ranks(size, both, name, optim, settings):
        torch.testing.assert_close(offloaded, plain, rtol=0, atol=0)


def saved(env, name, offload, path):
    engine = engine_with(name, env.size, "adamw", offload)
    with mock.patch.object(optimizer_offload, "SMALL", LEAST):
        train(engine, 0, 2, COUNT, 1)
        dcp.save(engine.state(), checkpoint_id=path)
        return train(engine, 2, 4, COUNT, 1), everything(engine)


def resumed(env, name, offload, path):
    engine = engine_with(name, env.size, "adamw", offload)
    with mock.patch.object(optimizer_offload, "SMALL", LEAST):
        train(engine, 7, 8, COUNT, 1)
        state = engine.state()
        dcp.load(state, checkpoint_id=path)
        engine.load(state)
        return train(engine, 2, 4, COUNT, 1), everything(engine)


@pytest.mark.parametrize("first", ["none", "optimizer"])
def test_a_checkpoint_goes_on_with_moments_on_the_host_or_without(first, tmp_path):
    other = "optimizer" if first == "none" else "none"
    expected = ranks(2, saved, "fsdp", first, str(tmp_path))[0]
    found = ranks(3, resumed, "fsdp", other, str(tmp_path))[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_a_step_left_out_on_the_device_leaves_moments_as_they_are():
    def fused(groups, **settings):
        return plain(groups, **{**settings, "fused": True})

    plain = torch.optim.AdamW
    with mock.patch.object(torch.optim, "AdamW", fused):
        engine = engine_with("single", 0, "adamw", "optimizer")
    with mock.patch.object(optimizer_offload, "SMALL", LEAST):
        train(engine, 0, 1, COUNT, 1)
        before = everything(engine)
        for unusable in (1.0, 0.0):
            for parameter in engine.parameters.values():
                parameter.grad = torch.full_like(parameter, torch.inf if unusable else 1.0)
            engine.step_unless(torch.tensor(unusable), 0.01)
            after = everything(engine)
            same = [
                torch.equal(value, after[part][name])
                for part, tensors in before.items()
                for name, value in tensors.items()
            ]
            assert all(same) if unusable else not any(same)


def test_who_has_no_gradient_is_not_updated_and_sends_nothing():
    engine = engine_with("single", 0, "adamw", "optimizer")
    with mock.patch.object(optimizer_offload, "SMALL", LEAST):
        first = next(iter(engine.parameters.values()))
        first.grad = torch.ones_like(first)
        before = everything(engine)
        members = [[*group["params"]] for group in engine.optimiser.param_groups]
        engine.step(0.01)
    assert engine.optimizer_offload.moved == 2 * first.nbytes
    after = everything(engine)["optimizer"]
    changed = {name for name, value in before["optimizer"].items() if not value.equal(after[name])}
    assert {name.rpartition(".")[0] for name in changed} == {next(iter(engine.parameters))}
    assert [group["params"] for group in engine.optimiser.param_groups] == members


def test_an_update_that_fails_leaves_groups_and_moments_in_their_places():
    engine = engine_with("single", 0, "adamw", "optimizer")
    mover = engine.optimizer_offload
    for parameter in engine.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    members = [[*group["params"]] for group in engine.optimiser.param_groups]
    with (
        mock.patch.object(optimizer_offload, "SMALL", LEAST),
        mock.patch.object(engine.optimiser, "step", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        engine.step(0.01)
    assert [group["params"] for group in engine.optimiser.param_groups] == members
    assert {id(value) for value in large(engine)} == {id(room) for room in mover.rooms.values()}


class Heavy(torch.optim.Optimizer):
    """SGD with a mean of gradients, made when it is first needed or from the start."""

    def __init__(self, parameters, eager):
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups if eager else ():
            for parameter in group["params"]:
                self.state[parameter]["mean"] = empty_moment(parameter)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "mean" not in state:
                    state["mean"] = torch.zeros_like(parameter)
                state["mean"].lerp_(parameter.grad, 0.1)
                parameter.add_(state["mean"], alpha=-group["lr"])


def on_host(tensor):
    return torch.empty_like(tensor, device="cpu")


def on_the_card(env, cut, eager):
    """Takes steps beside the host: where moments lie before each and at the end, and weights."""
    device = the_card()
    offload = OptimizerOffload(device, on_host)
    mesh = init_device_mesh(NAME, (env.size,))
    parameters = []
    for size in (300, 3):
        tensor = torch.ones(size, 300, device=device)
        if cut:
            tensor = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
        parameters.append(nn.Parameter(tensor))
    optimiser = offload.build(lambda: Heavy(parameters, eager))
    places = []
    for _ in range(2):
        places.append([optimiser.state[p]["mean"].device.type for p in parameters if eager])
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        offload.step(optimiser)
    moments = [optimiser.state[p]["mean"] for p in parameters]
    assert all(isinstance(moment, DTensor) == cut for moment in moments)
    places.append([local_tensor(moment).device.type for moment in moments])
    return places, [local_tensor(parameter).detach().cpu() for parameter in parameters]


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_a_device_that_is_not_the_host_updates_with_moments_of_its_own(cut, eager):
    there = ["cpu", NAME]  # the second is small and stays
    with card_pool(2) as pool:
        for places, weights in pool(on_the_card, cut, eager):
            assert places == ([there] * 3 if eager else [[], [], there])
            # means of 0.1 and 0.19, at a rate of 0.1
            assert all(torch.allclose(weight, torch.tensor(0.971)) for weight in weights)


def test_the_host_is_refused_as_a_device_to_move_moments_from():
    with pytest.raises(ValueError, match=r"engine\.offload=optimizer, but .* engine\.offload=none"):
        Single(Mesh.alone(), small_model.OPTIM, offload="optimizer").wrap(on_meta())
    with pytest.raises(ValueError, match=r"engine\.offload=parameters is not .* engine=deepspeed"):
        Single(Mesh.alone(), small_model.OPTIM, offload="parameters")
