"""Every engine, on any number of ranks and micro-batches, trains exactly what plain torch trains in
one process."""

import functools

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh
from tests.support.pool import ranks
from tests.support.small_model import (
    CLIP,
    ENGINES,
    OPTIM,
    Small,
    engine_here,
    losses,
    on_meta,
    plain_start,
    rows,
    train,
    truth,
    valid,
    whole,
)

COUNT = 6  # rows a step: 1, 2 and 3 ranks and 2 micro-batches divide it
STEPS = 3

true_run = functools.cache(truth)


def trained(env, name, micro, settings):
    engine = engine_here(name, env.size, **settings)
    norms = train(engine, 0, STEPS, COUNT, micro)
    return whole(engine), norms, [n for n, _ in engine.model.named_parameters()]


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    "name, size",
    [("single", 1), ("single", 2), ("single", 3), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3)],
)
def test_three_clipped_steps_equal_the_one_process_run(name, size, micro):
    expected, expected_norms = true_run(STEPS, COUNT)
    assert min(expected_norms) > CLIP  # clipping is at work
    for parameters, norms, names in ranks(size, trained, name, micro, {}):
        assert names == list(expected)
        torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("settings", [{"reshard_after_forward": False}, {"precision": "float32"}])
def test_fsdp_settings_do_not_change_the_result(settings):
    expected, _ = true_run(STEPS, COUNT)
    tolerance = (
        2e-4 if "precision" in settings else 1e-10
    )  # float32: AdamW divides tiny gradients by their size
    for parameters, _, _ in ranks(2, trained, "fsdp", 2, settings):
        for key, tensor in parameters.items():
            torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=tolerance)


def started(env, name):
    return whole(engine_here(name, env.size))


@pytest.mark.parametrize(
    "name, size", [("single", 1), ("single", 2), ("fsdp", 1), ("fsdp", 2), ("fsdp", 3)]
)
def test_initial_weights_are_the_same_bits_on_any_number_of_ranks(name, size):
    expected = {key: p.detach() for key, p in plain_start().named_parameters()}
    for parameters in ranks(size, started, name):
        assert list(parameters) == list(expected)
        assert all(torch.equal(parameters[key], tensor) for key, tensor in expected.items())


def tied_and_computed(env, name):
    model = engine_here(name, env.size).model
    return model.head.weight is model.embedding.weight, model.wave


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_a_model_from_the_meta_device_keeps_its_ties_and_gets_its_buffers(name):
    for tied, wave in ranks(2, tied_and_computed, name):
        assert tied
        assert torch.equal(wave, torch.arange(5, dtype=torch.float64).sin())


def bfloat16(env, name):
    engine = engine_here(name, env.size, precision="bfloat16")
    dtypes = {p.dtype for p in engine.parameters.values()}
    norms = train(engine, 0, STEPS, COUNT, 2)
    return dtypes, whole(engine), norms, engine.model(rows(0, 1)[0].tokens[None]).dtype


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_computes_in_it_and_stores_float32_alike_in_both_engines(size):
    expected, expected_norms = true_run(STEPS, COUNT)
    runs = {name: ranks(size, bfloat16, name)[0] for name in ("single", "fsdp")}
    for dtypes, parameters, norms, computed in runs.values():
        assert dtypes == {torch.float32} and computed == torch.bfloat16
        torch.testing.assert_close(norms, expected_norms, rtol=0.05, atol=0)
        for key, tensor in parameters.items():
            torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=0.02)
    torch.testing.assert_close(
        runs["single"][2][0], runs["fsdp"][2][0], rtol=1e-6, atol=0
    )  # the first gradient


def test_the_bfloat16_copies_follow_their_float32_masters():
    engine = ENGINES["single"](Mesh.alone(), OPTIM, precision="bfloat16", seed=3)
    engine.wrap(on_meta())
    before = whole(engine)
    train(engine, 0, 1, COUNT, 1)
    for name, copy in engine.model.named_parameters():
        assert copy.dtype == torch.bfloat16 and torch.equal(
            copy, engine.parameters[name].bfloat16()
        )
        assert not torch.equal(engine.parameters[name], before[name])


def unused(env, name):
    """A parameter that no rank uses keeps its value: it is not decayed either."""
    engine = engine_here(name, env.size)
    before = whole(engine)["blocks.1.up.weight"]
    engine.model.blocks = engine.model.blocks[:1]
    train(engine, 0, 1, COUNT, 1)
    return before, whole(engine)["blocks.1.up.weight"]


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_what_no_rank_uses_is_left_alone(name):
    for before, after in ranks(2, unused, name):
        assert torch.equal(before, after)


def used_on_one(env):
    engine = engine_here("single", env.size)
    batch = rows(0, COUNT)
    if env.rank:
        engine.model.blocks = engine.model.blocks[:0]
    engine.backward(losses(engine.model, batch[3]) / valid(batch))
    return engine.parameters["blocks.0.up.weight"].grad


def test_single_counts_a_parameter_unused_on_one_rank_as_zero_there():
    first, second = ranks(2, used_on_one)
    assert torch.equal(first, second) and first.abs().sum() > 0


def partly_used(env, name, micro):
    """Rank 1 needs neither the middle of block 0 nor its norm, and nobody the bias of block 1."""
    engine = engine_here(name, env.size)
    batch = rows(0, COUNT)
    first, second = engine.model.blocks
    second.up.forward = lambda x: torch.nn.functional.linear(x, second.up.weight)
    if env.rank:
        first.up.forward = lambda x: x[..., :4]
        first.norm.forward = lambda x: x
    for part in range(micro):
        engine.backward(
            losses(engine.model, batch[3 + part]) / valid(batch), last=part == micro - 1
        )
    grads = {key: p.grad for key, p in engine.parameters.items()}
    return {key: g.full_tensor() if isinstance(g, DTensor) else g for key, g in grads.items()}


def partly_used_under_an_older_torch(env, name, micro):
    with pytest.MonkeyPatch.context() as patch:  # the setting came with torch 2.13
        patch.delattr(FSDPModule, "set_reduce_scatter_unused_params", raising=False)
        return partly_used(env, name, micro)


@pytest.mark.parametrize("used", [partly_used, partly_used_under_an_older_torch])
@pytest.mark.parametrize("micro", [1, 2])
def test_fsdp_counts_a_parameter_unused_on_one_rank_as_zero_there_and_as_unused_if_no_rank_has_it(
    micro, used
):
    expected = ranks(3, partly_used, "single", micro)[0]
    for grads in ranks(3, used, "fsdp", micro):
        assert {key for key, grad in grads.items() if grad is None} == {"blocks.1.up.bias"}
        assert grads["blocks.0.up.weight"].abs().sum() > 0
        del grads["blocks.1.up.bias"]
        torch.testing.assert_close(grads, {key: expected[key] for key in grads}, rtol=0, atol=1e-12)


def measured(env, name):
    """The norm with clipping off, of a gradient that stays as it is."""
    engine = engine_here(name, env.size)
    batch = rows(0, COUNT)
    for row in batch[env.rank :: env.size]:
        engine.backward(
            losses(engine.model, row) / valid(batch), last=row is batch[COUNT - env.size + env.rank]
        )
    grads = [
        p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for p in engine.parameters.values()
    ]
    return (
        engine.clip(None),
        engine.clip(0),
        torch.cat([g.flatten() for g in grads]).norm().item(),
        engine.clip(1e9),
    )


@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_the_norm_counts_every_parameter_once_and_no_clipping_leaves_the_gradient(name):
    results = ranks(3, measured, name)
    assert len(set(results)) == 1
    torch.testing.assert_close(results[0], (true_run(1, COUNT)[1][0],) * 4, rtol=1e-12, atol=0)


def evaluated(env, name):
    """A forward without gradient, then the state, then a step: nothing of the first is left in the
    others."""
    engine = engine_here(name, env.size)
    with torch.no_grad():
        losses(engine.model, rows(0, 1)[0])
    kinds = {type(tensor) for tensor in engine.state()["model"].values()}
    train(engine, 0, STEPS, COUNT, 1)
    return kinds, whole(engine)


@pytest.mark.parametrize("name, kind", [("single", torch.Tensor), ("fsdp", DTensor)])
def test_evaluating_between_steps_changes_nothing(name, kind):
    for kinds, parameters in ranks(2, evaluated, name):
        assert kinds == {kind}
        torch.testing.assert_close(parameters, true_run(STEPS, COUNT)[0], rtol=0, atol=1e-10)


@pytest.mark.every_case
@pytest.mark.parametrize("name", ["single", "fsdp"])
@pytest.mark.parametrize("setting", [{"precision": "float16"}, {"checkpointing": "some"}])
def test_a_setting_that_is_not_offered_is_refused_by_name(name, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting.values()))} is not offered"):
        ENGINES[name](Mesh.alone(), OPTIM, **setting)


def test_what_compiled_blocks_compute_cannot_be_kept():
    with pytest.raises(ValueError, match=r"checkpointing=selective cannot keep"):
        ENGINES["single"](Mesh.alone(), OPTIM, checkpointing="selective", compile=True)


def test_fsdp_without_started_ranks_is_refused():
    with pytest.raises(ValueError, match="use engine=single"):
        ENGINES["fsdp"](Mesh.alone(), OPTIM)


def test_single_needs_no_started_ranks():
    expected, expected_norms = true_run(STEPS, COUNT)
    engine = ENGINES["single"](Mesh.alone(), OPTIM, precision="float64", seed=3)
    engine.wrap(on_meta())
    torch.testing.assert_close(
        train(engine, 0, STEPS, COUNT, 2), expected_norms, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(whole(engine), expected, rtol=0, atol=1e-12)


def test_weights_that_a_model_has_already_are_kept():
    model = Small().double()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = ENGINES["single"](Mesh.alone(), OPTIM, precision="float64")
    engine.wrap(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole(engine).items())
