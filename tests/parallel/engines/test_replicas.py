"""Parameters sharded over some ranks and copied over the rest (HSDP): the same training as any
other placement."""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

from parallel.mesh import Mesh, build_mesh
from tests.support import small_mixture, small_model
from tests.support.pool import ranks

COUNT = 8  # rows a step; they differ in how many valid targets they have


def trained(env, name, replicas, precision, micro, steps):
    engine = small_model.ENGINES[name](
        build_mesh(1, env.size, replicas=replicas), small_model.OPTIM, precision=precision, seed=3
    )
    engine.wrap(small_model.on_meta())
    sizes = {
        key: p.to_local().numel() if isinstance(p, DTensor) else p.numel()
        for key, p in engine.parameters.items()
    }
    norms = small_model.train(engine, 0, steps, COUNT, micro)
    return norms, small_model.whole(engine), sizes


@functools.cache
def plain(steps):
    return small_model.truth(steps, COUNT)


@pytest.mark.short("2-1-12")
@pytest.mark.parametrize(
    "replicas, micro, steps",
    [
        (1, 2, 12),
        (2, 1, 12),
        (4, 2, 12),
        *(
            pytest.param(replicas, micro, 50, marks=pytest.mark.full)
            for replicas in (1, 2, 4)
            for micro in (1, 2)
        ),
    ],
)
def test_steps_equal_the_one_process_run_however_often_parameters_are_held(replicas, micro, steps):
    weights, norms = plain(steps)
    for found in ranks(4, trained, "fsdp", replicas, "float64", micro, steps):
        torch.testing.assert_close(found[0], norms, rtol=1e-11, atol=0)
        for key, tensor in weights.items():
            torch.testing.assert_close(
                found[1][key], tensor, rtol=0, atol=1e-11 * tensor.abs().max().item()
            )


@pytest.mark.full
def test_fifty_steps_in_float32_equal_the_other_engines():
    (single, *_), *_ = ranks(4, trained, "single", 1, "float32", 2, 50)
    for replicas in (1, 2):
        for found in ranks(4, trained, "fsdp", replicas, "float32", 2, 50):
            torch.testing.assert_close(found[0], single, rtol=1e-4, atol=0)


def test_a_rank_holds_its_share_of_one_replica():
    held = {
        n: sum(sum(sizes.values()) for *_, sizes in ranks(4, trained, "fsdp", n, "float64", 1, 1))
        for n in (1, 2, 4)
    }
    assert held[2] == 2 * held[1] and held[4] == 4 * held[1]


def mixed(env, shape):
    engine = small_mixture.engine_here("fsdp", shape)
    sizes = {key: tuple(p.to_local().shape) for key, p in engine.parameters.items()}
    return (
        *small_mixture.train(engine, range(5)),
        small_mixture.everything(engine)["model"],
        sizes["blocks.0.mixture.experts.up"],
    )


@functools.cache
def alone():
    engine = small_mixture.engine_on(Mesh.alone(), "single")
    return *small_mixture.train(engine, range(5)), small_mixture.everything(engine)["model"]


@pytest.mark.short("2-4-local2")
@pytest.mark.parametrize(
    "experts, replicas, local",
    [
        pytest.param(2, 2, (2, 24, 16), marks=pytest.mark.full),
        (4, 2, (1, 24, 16)),
        (2, 4, (2, 24, 16)),
        pytest.param(1, 2, (2, 24, 16), marks=pytest.mark.full),
    ],
)
def test_experts_over_ranks_of_replicas_train_what_one_process_trains(experts, replicas, local):
    """A replica may have as many ranks as share the experts, or fewer; its stacks are then copies
    of their own."""
    losses, norms, gradients, weights = alone()
    for found in ranks(
        4, mixed, {"context": 2, "data": 2, "experts": experts, "replicas": replicas}
    ):
        torch.testing.assert_close(found[0], losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-11, atol=0)
        for mine, true in ((found[2], gradients), (found[3], weights)):
            for key, tensor in true.items():
                torch.testing.assert_close(
                    mine[key], tensor, rtol=0, atol=1e-11 * tensor.abs().max().item()
                )
        assert found[4] == local
