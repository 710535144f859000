"""A state saved by one engine on some ranks goes on, bit for bit, in another on others."""

import pytest
import torch
import torch.distributed.checkpoint as dcp

from parallel.engines.single import Single
from parallel.mesh import Mesh
from tests.support.pool import ranks
from tests.support.small_model import OPTIM, engine_here, on_meta, train

COUNT = 6


def everything(engine):
    """Every tensor of the state, gathered, by part and name."""
    state = engine.state()
    return {
        part: {
            name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone()
            for name, t in tensors.items()
        }
        for part, tensors in state.items()
    }


def saved(env, name, path, settings):
    engine = engine_here(name, env.size, **settings)
    train(engine, 0, 2, COUNT, 1)
    dcp.save(engine.state(), checkpoint_id=path)
    before = everything(engine)
    return before, train(engine, 2, 4, COUNT, 1)


def resumed(env, name, path, settings):
    engine = engine_here(name, env.size, seed=4, **settings)
    train(engine, 7, 8, COUNT, 1)  # somewhere else, so that loading has something to do
    state = engine.state()
    dcp.load(state, checkpoint_id=path)
    engine.load(state)
    return everything(engine), train(engine, 2, 4, COUNT, 1)


WAYS = [
    ("fsdp", 2, "single", 1),
    ("single", 2, "fsdp", 3),
    ("fsdp", 3, "fsdp", 2),
    ("single", 1, "fsdp", 2),
]


@pytest.mark.short("single-2-fsdp-3-bfloat16", "fsdp-2-single-1-float64")
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("name, size, then, on", WAYS)
def test_a_checkpoint_goes_on_in_another_engine_on_other_ranks(
    name, size, then, on, precision, tmp_path
):
    settings = {"precision": precision}
    before, norms = ranks(size, saved, name, str(tmp_path), settings)[0]
    for after, norms_after in ranks(on, resumed, then, str(tmp_path), settings):
        assert after.keys() == before.keys()
        for part in before:
            assert after[part].keys() == before[part].keys()
            assert all(
                torch.equal(after[part][key], tensor) for key, tensor in before[part].items()
            )
        tolerance = 1e-10 if precision == "float64" else 0.02  # the sums are taken in another order
        torch.testing.assert_close(norms_after, norms, rtol=tolerance, atol=0)


def unstepped(env, name):
    return everything(engine_here(name, env.size))["optimizer"]


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_the_state_before_the_first_step_is_there_and_counts_no_step(name):
    moments = ranks(2, unstepped, name)[1]
    assert {key.rsplit(".", 1)[1] for key in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all(not tensor.any() for tensor in moments.values())


def handed_over(env):
    """Whole tensors into shards, and shards into whole tensors, without files."""
    sharded, kept = engine_here("fsdp", env.size), engine_here("single", env.size)
    train(kept, 0, 2, COUNT, 1)
    sharded.load(kept.state())
    there = everything(sharded)
    train(kept, 2, 3, COUNT, 1)
    kept.load(sharded.state())
    return there, everything(kept), train(sharded, 2, 3, COUNT, 1), train(kept, 2, 3, COUNT, 1)


def test_engines_take_each_others_state_without_files():
    for there, back, norm, norm_back in ranks(3, handed_over):
        for part in there:
            assert all(torch.equal(tensor, back[part][key]) for key, tensor in there[part].items())
        torch.testing.assert_close(norm, norm_back, rtol=1e-10, atol=0)


def test_a_state_of_another_model_is_refused_with_the_names():
    engine = Single(Mesh.alone(), OPTIM)
    engine.wrap(on_meta())
    state = engine.state()
    state["model"] = {name.replace("up", "gate"): tensor for name, tensor in state["model"].items()}
    with pytest.raises(ValueError, match=r"blocks.0.up.bias.*blocks.0.gate.bias"):
        engine.load(state)


def test_a_tensor_of_another_shape_is_refused():
    engine = Single(Mesh.alone(), OPTIM)
    engine.wrap(on_meta())
    state = engine.state()
    state["model"]["norm.weight"] = torch.ones(4)
    with pytest.raises(ValueError, match=r"norm.weight.*\[4\].*\[5\]"):
        engine.load(state)
