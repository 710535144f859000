"""The values of the first layer reach the layers above however blocks are gathered, computed again,
compiled or cut."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.block import ValueBlock
from models.init import initialise, normal
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.recurrent.rwkv7 import Rwkv7
from models.recurrent.rwkv_layers import ChannelMix
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.sharding import shard_span
from tests.support.parity import packed
from tests.support.pool import ranks
from trainer.optim.adamw import AdamW

ENGINES = {"single": Single, "fsdp": Fsdp}
WORDS, WIDTH, HEADS, LAYERS, STEPS = 13, 24, 6, 4, 2


class Pulled(Rwkv7):
    """RWKV-7 whose pull toward the first values depends on the token from the start."""

    def init_rules(self):
        return {**super().init_rules(), **({"pull.down.weight": normal(0.3)} if self.layer else {})}


def decoder() -> nn.Module:
    """The first layer that shares its values is the second; the third hears nothing of them."""
    mixers = [Pulled(WIDTH, HEADS, layer, LAYERS, rank=5) for layer in range(LAYERS)]
    mixers[0], mixers[2] = (Attention(WIDTH, HEADS, 3, Rope()) for _ in range(2))
    return Decoder(
        WORDS, WIDTH, mixers, [ChannelMix(WIDTH, 30, layer, LAYERS) for layer in range(LAYERS)]
    )


def data():
    span, draw = packed(), torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(0, WORDS, span.shape, generator=draw) for _ in range(2))
    return tokens, targets.masked_fill(~span.valid(), IGNORE), span


def trained(engine, tokens, span, targets, valid):
    """(parameters, gradient norms) after some steps."""
    norms = []
    for _ in range(STEPS):
        engine.backward(engine.model(MicroBatch(tokens, span, targets)).sum() / valid)
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    state = engine.state()["model"]
    return {
        key: t.full_tensor() if isinstance(t, DTensor) else t.clone() for key, t in state.items()
    }, norms


@functools.cache
def alone(**settings):
    engine = Single(
        Mesh.alone(), AdamW(learning_rate=1e-2), precision="float64", seed=5, **settings
    )
    parallelize(initialise(decoder(), seed=5), engine)
    tokens, targets, span = data()
    return trained(engine, tokens, span, targets, (targets != IGNORE).sum())


def placed(env, name, checkpointing):
    with torch.device("meta"):
        model = decoder()
    engine = ENGINES[name](
        build_mesh(env.size, 1),
        AdamW(learning_rate=1e-2),
        precision="float64",
        seed=5,
        checkpointing=checkpointing,
    )
    parallelize(model, engine, method="ring")
    tokens, targets, span = data()
    here = shard_span(span, [layout("zigzag", span.shape[1], env.size)] * 2, env.rank)
    mine = here.sharding.shard(tokens, 0), here, here.sharding.shard(targets, IGNORE)
    return trained(engine, *mine, (targets != IGNORE).sum())


def same(found):
    for got, want in zip(found, alone()):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", ["single", "fsdp"])
def test_values_are_shared_alike_on_ranks(name, checkpointing):
    for found in ranks(3, placed, name, checkpointing):
        same(found)


def test_values_are_shared_alike_by_blocks_computed_again():
    same(alone(checkpointing="full"))


@pytest.mark.full
def test_values_are_shared_alike_by_compiled_blocks(monkeypatch):
    """With the compiler's own kernels the test takes minutes and says no more: what could fail is
    the capture."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    same(alone(compile=True))


def test_the_first_values_matter_to_the_layers_above_and_to_no_other():
    model, (tokens, _, span) = initialise(decoder(), seed=5).double(), data()
    assert [isinstance(block, ValueBlock) for block in model.blocks] == [False, True, False, True]
    heard, forward = [], model.blocks[3].mixer.values
    model.blocks[3].mixer.values = lambda x, span, first: (
        heard.append(first) or forward(x, span, first)
    )
    model(MicroBatch(tokens, span)).square().sum().backward()
    assert heard[0].grad_fn is not None
    want = model.blocks[1].mixer
    assert torch.equal(
        heard[0], want.values(model.blocks[1].mixer_norm(below(model, tokens, span)), span, None)[1]
    )
    assert model.blocks[3].mixer.pull.down.weight.grad.abs().max() > 0


def below(model, tokens, span):
    """What comes into the second block."""
    return model.blocks[0](model.embed(tokens), span)
