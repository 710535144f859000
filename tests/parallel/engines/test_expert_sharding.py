"""Experts over ranks, whatever else the ranks share: every engine trains what one process
trains."""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh
from tests.support.pool import ranks
from tests.support.small_mixture import (
    CLIP,
    EXPERTS,
    WIDTH,
    engine_here,
    engine_on,
    everything,
    train,
    whole,
)

STEPS = range(5)
SHAPES = [  # context, data, experts
    (2, 1, 2),
    (1, 2, 2),
    (2, 2, 2),
    (1, 4, 2),
    (2, 2, 4),
    (1, 4, 4),
]


@functools.cache
def alone(hidden=16, precision="float64"):
    engine = engine_on(Mesh.alone(), "single", hidden=hidden, precision=precision)
    found = train(engine, STEPS)
    return *found, everything(engine)["model"]


def close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance * tensor.abs().max().item(), msg=name
        )


def placed(env, name, shape, settings):
    engine = engine_here(name, shape, **settings)
    kinds = {
        key: tuple(p.to_local().shape)
        for key, p in engine.parameters.items()
        if isinstance(p, DTensor)
    }
    return *train(engine, STEPS), everything(engine)["model"], kinds


def shape_of(context, data, experts, replicas=1):
    return {"context": context, "data": data, "experts": experts, "replicas": replicas}


@pytest.mark.short("1-2-2-fsdp", "1-4-4-single", "2-2-4-single")
@pytest.mark.parametrize("name", ["single", "fsdp"])
@pytest.mark.parametrize("context, data, experts", SHAPES)
def test_experts_over_ranks_train_what_one_process_trains(name, context, data, experts):
    losses, norms, gradients, weights = alone()
    assert min(norms) > CLIP  # clipping is at work
    size = context * data
    for found in ranks(size, placed, name, shape_of(context, data, experts), {}):
        torch.testing.assert_close(found[0], losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-11, atol=0)
        close(found[2], gradients, 1e-11)
        close(found[3], weights, 1e-11)
        across = size // experts if name == "fsdp" else 1
        assert found[4]["blocks.0.mixture.experts.up"] == (EXPERTS // experts, WIDTH // across, 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"checkpointing": "full", "hidden": 15},
        pytest.param({"checkpointing": "full"}, marks=pytest.mark.full),
        pytest.param({"hidden": 15}, marks=pytest.mark.full),
        pytest.param({"reshard_after_forward": False}, marks=pytest.mark.full),
    ],
)
def test_how_the_rest_is_placed_changes_nothing(settings):
    """Blocks computed again; stacks that FSDP2 cannot cut evenly and leaves whole; weights kept
    until backward."""
    losses, norms, gradients, weights = alone(settings.get("hidden", 16))
    for found in ranks(4, placed, "fsdp", shape_of(2, 2, 2), settings):
        torch.testing.assert_close(found[0], losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-11, atol=0)
        close(found[2], gradients, 1e-11)
        close(found[3], weights, 1e-11)
        assert found[4]["blocks.0.mixture.experts.bias"] == (2, 15 if "hidden" in settings else 8)


def start(env, name, shape):
    return everything(engine_here(name, shape))["model"]


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_initial_weights_of_experts_are_the_same_bits_on_any_number_of_ranks(name):
    expected = everything(engine_on(Mesh.alone(), "single"))["model"]
    for found in ranks(4, start, name, shape_of(2, 2, 2)):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.short("single-16")
@pytest.mark.parametrize("hidden", [16, 15])
@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_in_bfloat16_experts_compute_in_it_and_are_stored_in_float32(name, hidden):
    losses, norms, *_ = alone(hidden, "bfloat16")
    for found in ranks(
        4, placed, name, shape_of(1, 4, 2), {"precision": "bfloat16", "hidden": hidden}
    ):
        assert {tensor.dtype for tensor in (*found[2].values(), *found[3].values())} == {
            torch.float32
        }
        # later losses drift apart: a token between two experts takes the other one
        torch.testing.assert_close(found[0][:2], losses[:2], rtol=2e-3, atol=0)
        torch.testing.assert_close(found[1][0], norms[0], rtol=2e-3, atol=0)


def idle(env, name, shape):
    """A parameter of the experts that nobody uses keeps its value."""
    engine = engine_here(name, shape)
    before = whole(engine.parameters["blocks.1.mixture.experts.up"])
    engine.model.blocks = engine.model.blocks[:1]
    mine = {key: p for key, p in engine.parameters.items() if not key.startswith("blocks.1")}
    engine.parameters, kept = mine, engine.parameters
    train(engine, range(1))
    return before, whole(kept["blocks.1.mixture.experts.up"])


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_experts_that_no_rank_uses_are_left_alone(name):
    for before, after in ranks(2, idle, name, shape_of(1, 2, 2)):
        assert torch.equal(before, after)


def refused(env, experts):
    with pytest.raises(ValueError) as error:
        engine_here("single", shape_of(1, env.size, experts))
    return str(error.value)


def test_experts_that_do_not_divide_are_refused():
    for said in ranks(3, refused, 3):
        assert "parallel.experts=3 does not divide the 4 experts of blocks." in said


def handed_over(env, shape):
    """The state of one engine into the other and back, without files."""
    cut, kept = engine_here("fsdp", shape), engine_here("single", shape)
    train(kept, range(2))
    cut.load(kept.state())
    there = everything(cut)
    train(kept, range(2, 3))
    kept.load(cut.state())
    return there, everything(kept), train(cut, range(2, 3))[:2], train(kept, range(2, 3))[:2]


@pytest.mark.full
def test_engines_take_each_others_experts_without_files():
    for there, back, cut, kept in ranks(4, handed_over, shape_of(2, 2, 2)):
        for part in there:
            assert all(torch.equal(tensor, back[part][key]) for key, tensor in there[part].items())
        torch.testing.assert_close(cut, kept, rtol=1e-11, atol=0)
