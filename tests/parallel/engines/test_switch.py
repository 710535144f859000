"""A Switch Transformer, its own losses and the tokens it drops included, in every engine as on one
device."""

import functools

import pytest
import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.auxiliary import auxiliary_loss, on_step_begin, reset_auxiliary
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.moe.switch import Switch
from models.moe.topk import TopKMixture
from models.positions.rope import Rope
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.pool import ranks
from tests.support.small_mixture import CLIP, ENGINES, OPTIM, WIDTH, WORDS, data, everything

STEPS = 3


def decoder():
    with torch.device("meta"):
        return Decoder(
            WORDS,
            WIDTH,
            [Attention(WIDTH, 6, 3, Rope()) for _ in range(2)],
            [
                Switch(
                    WIDTH,
                    16,
                    0,
                    2,
                    5,
                    experts=4,
                    capacity_factor=1.1,
                    jitter=0.1,
                    router_scale=50.0,
                    balance=0.1,
                ),
                TopKMixture(
                    WIDTH, 16, 1, 2, 5, experts=8, top=2, shared=1, score="sigmoid", balance=0.1
                ),
            ],
        )


def trained(env, name, shape, settings):
    mesh = build_mesh(**shape) if env else Mesh.alone()
    engine = ENGINES[name](mesh, OPTIM, precision="float64", seed=5, **settings)
    communicator = parallelize(decoder(), engine, method="ring")
    losses, norms = [], []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        valid, total = int((targets != IGNORE).sum()), torch.zeros(2, dtype=torch.float64)
        on_step_begin(engine.model, step + 1)
        mine = range(len(tokens))[mesh.data.rank :: mesh.data.size]
        for row in mine:
            one = slice(row, row + 1)
            here, words, wanted = span.map(lambda x, one=one: x[one]), tokens[one], targets[one]
            if mesh.context.size > 1:
                here = shard_span(
                    here, [layout("zigzag", span.shape[1], mesh.context.size)], mesh.context.rank
                )
                words, wanted = here.sharding.shard(words, 0), here.sharding.shard(wanted, IGNORE)
            reset_auxiliary(engine.model)
            loss = engine.model(MicroBatch(words, here, wanted)).sum() / valid
            beside = sum(auxiliary_loss(engine.model, tokens=valid, rows=len(tokens)).values())
            engine.backward(loss + beside, last=row == mine[-1])
            total += torch.stack([loss.detach(), beside.detach()])
        if mesh.world.group is not None:
            torch.distributed.all_reduce(total, group=mesh.world.group)
        losses.append(total.tolist())
        norms.append(engine.clip(CLIP))
        engine.step(0.01)
    return (
        losses,
        norms,
        everything(engine)["model"],
        communicator and sorted(communicator.bytes_sent),
    )


@functools.cache
def alone():
    return trained(None, "single", None, {})


@pytest.mark.parametrize(
    "name, shape, settings",
    [
        pytest.param("single", {"context": 1, "data": 2, "experts": 2}, {}, marks=pytest.mark.full),
        ("single", {"context": 2, "data": 2, "experts": 4}, {}),
        pytest.param(
            "fsdp",
            {"context": 2, "data": 1, "experts": 2},
            {"checkpointing": "full"},
            marks=pytest.mark.full,
        ),
        pytest.param("fsdp", {"context": 2, "data": 2, "experts": 2}, {}, marks=pytest.mark.full),
        ("fsdp", {"context": 1, "data": 4, "experts": 4, "replicas": 2}, {}),
        pytest.param("fsdp", {"context": 2, "data": 2}, {}, marks=pytest.mark.full),
    ],
)
def test_a_switch_transformer_trains_alike_wherever_its_experts_lie(name, shape, settings):
    losses, norms, weights, _ = alone()
    for found in ranks(shape["context"] * shape["data"], trained, name, shape, settings):
        assert ("visits" in found[3]) == ("experts" in shape)
        torch.testing.assert_close(found[0], losses, rtol=1e-11, atol=0)
        torch.testing.assert_close(found[1], norms, rtol=1e-11, atol=0)
        assert found[2].keys() == weights.keys()
        for key, tensor in weights.items():
            torch.testing.assert_close(
                found[2][key], tensor, rtol=0, atol=1e-11 * tensor.abs().max().item(), msg=key
            )
