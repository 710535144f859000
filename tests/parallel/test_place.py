"""A decoder placed on ranks that share its rows trains what the decoder trains alone, whatever is applied to its blocks."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.decoder import Decoder
from models.init import initialise
from models.loss import IGNORE
from models.positions.rope import Rope
from parallel.cut import cut_span
from parallel.engines.fsdp import Fsdp
from parallel.engines.single import Single
from parallel.layout import layout
from parallel.mesh import Mesh, build_mesh
from parallel.place import place
from tests.parallel.parity import packed
from tests.pool import ranks
from trainer.optim import AdamW

ENGINES = {"single": Single, "fsdp": Fsdp}
WORDS, WIDTH, HEADS, STEPS = 13, 24, 6, 2


def decoder() -> nn.Module:
    mixers = [Attention(WIDTH, HEADS, 3, Rope()), Sliding(WIDTH, HEADS, 3, Rope(), reach=7)]
    return Decoder(WORDS, WIDTH, mixers, 16, position=Rope(), tie=True)


def data(step):
    """([2, T] tokens, targets, span): rows of several documents, padding, some targets missing."""
    span = packed()
    draw = torch.Generator().manual_seed(step)
    tokens, targets = (torch.randint(0, WORDS, span.shape, generator=draw) for _ in range(2))
    return tokens, targets.masked_fill(~span.valid() | (span.pos % 5 == 3), IGNORE), span


@functools.cache
def alone():
    engine = Single(Mesh.alone(), AdamW(learning_rate=1e-2), precision="float64", seed=5)
    engine.wrap(initialise(decoder(), seed=5))
    norms = []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        engine.backward(engine.model(tokens, span, targets).sum() / (targets != IGNORE).sum())
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    return {name: p.detach() for name, p in engine.parameters.items()}, norms


def placed(env, name, method, grid, settings):
    with torch.device("meta"):
        model = decoder()
    names = list(model.state_dict())
    mesh = build_mesh(env.size, 1, **grid)
    engine = ENGINES[name](mesh, AdamW(learning_rate=1e-2), precision="float64", seed=5, **settings)
    wire = place(model, engine, method=method)
    assert list(engine.state()["model"]) == names
    norms = []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        valid = (targets != IGNORE).sum()
        for row in range(2):  # two micro-batches of a row each
            here = cut_span(span.map(lambda x, r=row: x[r : r + 1]), [layout("zigzag", span.shape[1], env.size)], env.rank)
            mine = here.cut.shard(tokens[row : row + 1], 0), here.cut.shard(targets[row : row + 1], IGNORE)
            engine.backward(engine.model(mine[0], here, mine[1]).sum() / valid, last=row == 1)
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    model = {key: tensor for key, tensor in engine.state()["model"].items() if key != "head.weight"}  # it is tied
    whole = {key: t.full_tensor() if isinstance(t, DTensor) else t.clone() for key, t in model.items()}
    return whole, norms, sum(wire.sent.values())


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", ["single", "fsdp"])
@pytest.mark.parametrize(
    "method, size, grid", [("ring", 3, {}), ("heads", 2, {}), ("auto", 3, {}), ("usp", 2, {"heads": 1, "ring": 2})]
)
def test_a_placed_decoder_trains_what_it_trains_alone(name, method, size, grid, checkpointing):
    expected, expected_norms = alone()
    for parameters, norms, sent in ranks(size, placed, name, method, grid, {"checkpointing": checkpointing}):
        assert sent > 0
        torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-10)


class Counted(nn.Module):
    """A block that counts how often it was computed."""

    def __init__(self):
        super().__init__()
        self.inner, self.runs = nn.Linear(3, 3), 0

    def forward(self, x):
        self.runs += 1
        return self.inner(x).tanh()


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("checkpointing, runs", [("none", 1), ("full", 2)])
def test_full_checkpointing_computes_each_block_a_second_time(checkpointing, runs):
    engine = Single(Mesh.alone(), AdamW(), checkpointing=checkpointing)
    model = Chain()
    names = list(model.state_dict())
    assert place(model, engine) is None  # one rank: nothing to spread
    engine.backward(engine.model(torch.ones(2, 3)).sum())
    assert [block.runs for block in model.blocks] == [runs, runs]
    assert list(engine.state()["model"]) == names


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_train_the_same_under_the_same_names(checkpointing):
    expected, expected_norms = alone()
    engine = Single(Mesh.alone(), AdamW(learning_rate=1e-2), precision="float64", checkpointing=checkpointing, compile=True)
    model = initialise(decoder(), seed=5)
    place(model, engine)
    norms = []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        engine.backward(engine.model(tokens, span, targets).sum() / (targets != IGNORE).sum())
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
    torch.testing.assert_close({name: p.detach() for name, p in engine.parameters.items()}, expected, rtol=0, atol=1e-10)


def counted_plans(env):
    """Layers with the same mask share a plan under fsdp too: the span of a block is the span that the model was given."""
    with torch.device("meta"):
        model = decoder()
    engine = Fsdp(build_mesh(1, env.size), AdamW(), seed=5)
    place(model, engine)
    tokens, targets, span = data(0)
    for _ in range(2):  # again with the same span: what it keeps must not be walked through
        engine.backward(engine.model(tokens, span, targets).sum() / targets.numel())
    return len(span.plans)


def test_a_span_reaches_the_blocks_as_it_is():
    assert all(count >= 2 for count in ranks(2, counted_plans))
