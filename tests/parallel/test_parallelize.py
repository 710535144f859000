"""A decoder placed on ranks that share its rows trains what the decoder trains alone, whatever is
applied to its blocks."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.feedforward import SwiGLU
from models.init import initialise
from models.kernels import blockwise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.primitives.softmax import Softmax
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
WORDS, WIDTH, HEADS, STEPS = 13, 24, 6, 2


def decoder() -> nn.Module:
    mixers = [Attention(WIDTH, HEADS, 3, Rope()), Sliding(WIDTH, HEADS, 3, Rope(), window=7)]
    return Decoder(
        WORDS,
        WIDTH,
        mixers,
        [SwiGLU(WIDTH, 16) for _ in mixers],
        position=Rope(),
        tie_embeddings=True,
    )


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
        engine.backward(
            engine.model(MicroBatch(tokens, span, targets)).sum() / (targets != IGNORE).sum()
        )
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    return {name: p.detach() for name, p in engine.parameters.items()}, norms


def placed(env, name, method, grid, settings):
    with torch.device("meta"):
        model = decoder()
    names = list(model.state_dict())
    mesh = build_mesh(env.size, 1, **grid)
    engine = ENGINES[name](mesh, AdamW(learning_rate=1e-2), precision="float64", seed=5, **settings)
    communicator = parallelize(model, engine, method=method)
    assert list(engine.state()["model"]) == names
    norms = []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        valid = (targets != IGNORE).sum()
        for row in range(2):  # two micro-batches of a row each
            here = shard_span(
                span.map(lambda x, r=row: x[r : r + 1]),
                [layout("zigzag", span.shape[1], env.size)],
                env.rank,
            )
            mine = (
                here.sharding.shard(tokens[row : row + 1], 0),
                here.sharding.shard(targets[row : row + 1], IGNORE),
            )
            engine.backward(
                engine.model(MicroBatch(mine[0], here, mine[1])).sum() / valid, last=row == 1
            )
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    model = {
        key: tensor for key, tensor in engine.state()["model"].items() if key != "head.weight"
    }  # it is tied
    whole = {
        key: t.full_tensor() if isinstance(t, DTensor) else t.clone() for key, t in model.items()
    }
    return whole, norms, sum(communicator.bytes_sent.values())


@pytest.mark.parametrize("checkpointing", ["none", "full", "selective"])
@pytest.mark.parametrize("name", ["single", "fsdp"])
@pytest.mark.parametrize(
    "method, size, grid",
    [("ring", 3, {}), ("ulysses", 2, {}), ("auto", 3, {}), ("usp", 2, {"ulysses": 1, "ring": 2})],
)
def test_a_placed_decoder_trains_what_it_trains_alone(name, method, size, grid, checkpointing):
    expected, expected_norms = alone()
    for parameters, norms, sent in ranks(
        size, placed, name, method, grid, {"checkpointing": checkpointing}
    ):
        assert sent > 0
        torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-10)


def compiled(env, name, method, grid, settings):
    """As `placed`, with the capture of the compiler and not its kernels, which would take minutes
    and say no more."""
    compiler, torch.compile = torch.compile, functools.partial(torch.compile, backend="aot_eager")
    try:
        return placed(env, name, method, grid, {**settings, "compile": True})
    finally:
        torch.compile = compiler
        torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, method, size, checkpointing",
    [
        ("fsdp", "ring", 3, "full"),
        pytest.param("single", "ulysses", 2, "none", marks=pytest.mark.full),
    ],
)
def test_compiled_blocks_share_their_rows_over_ranks(name, method, size, checkpointing):
    expected, expected_norms = alone()
    for parameters, norms, sent in ranks(
        size, compiled, name, method, {}, {"checkpointing": checkpointing}
    ):
        assert sent > 0
        torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
        torch.testing.assert_close(parameters, expected, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_the_compiler_sees_what_lies_between_the_primitives_and_nothing_of_these(monkeypatch):
    seen = []

    def look(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=look))
    model = initialise(decoder(), seed=5)
    engine = Single(Mesh.alone(), AdamW(learning_rate=1e-2), precision="float64", compile=True)
    parallelize(model, engine)
    tokens, targets, span = data(0)
    engine.model(MicroBatch(tokens, span, targets)).sum().backward()
    assert any("silu" in name for name in seen), "the feed-forward layer is compiled"
    assert not any(
        word in name for name in seen for word in ("softmax", "logsumexp", "attention")
    ), seen
    torch.compiler.reset()


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


def sent(env, method, grid, checkpointing):
    """Bytes that a rank sends in two steps, by name of the move."""
    engine = Single(
        build_mesh(env.size, 1, **grid),
        AdamW(),
        precision="float64",
        seed=5,
        checkpointing=checkpointing,
    )
    with torch.device("meta"):
        model = decoder()
    communicator = parallelize(model, engine, method=method)
    for step in range(2):
        tokens, targets, span = data(step)
        here = shard_span(span, [layout("zigzag", span.shape[1], env.size)], env.rank)
        losses = engine.model(
            MicroBatch(here.sharding.shard(tokens, 0), here, here.sharding.shard(targets, IGNORE))
        )
        engine.backward(losses.sum())
        engine.step(0.01)
    return dict(communicator.bytes_sent)


FORWARD = {"ring": {"ring"}, "allgather": {"allgather"}, "usp": {"ring"}}


@pytest.mark.parametrize(
    "method, size, grid",
    [("ring", 3, {}), ("allgather", 3, {}), ("usp", 4, {"ulysses": 2, "ring": 2})],
)
def test_selective_checkpointing_does_not_send_keys_again(method, size, grid):
    for none, full, selective in zip(
        *(ranks(size, sent, method, grid, word) for word in ("none", "full", "selective"))
    ):
        moves = FORWARD[method]
        assert sum(none[move] for move in moves) > 0
        for move, count in none.items():
            traded = move in ("deal", "collect")  # heads for tokens: repeated, attention is not
            assert full[move] == (2 * count if move in moves or traded else count)
            assert selective[move] == (2 * count if traded else count)


class Attentions(nn.Module):
    """A block that attends twice by the same leaf."""

    def __init__(self):
        super().__init__()
        self.inner = Attention(WIDTH, HEADS, 3, Rope())

    def forward(self, x, span):
        return self.inner(self.inner(x, span).tanh(), span)


@pytest.mark.parametrize("checkpointing, runs", [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_checkpointing_computes_all_but_attention_again(checkpointing, runs, monkeypatch):
    """Also where a pass is repeated before the backward of the one before, and where backward runs
    twice."""
    calls, true = [], blockwise.forward
    monkeypatch.setattr(blockwise, "forward", lambda *args: (calls.append(1), true(*args))[1])
    engine = Single(Mesh.alone(), AdamW(), precision="float64", seed=5, checkpointing=checkpointing)
    model = nn.Module()
    model.blocks = nn.ModuleList(initialise(Attentions(), seed=5) for _ in range(2))
    model.forward = lambda x, span: model.blocks[1](model.blocks[0](x, span), span)
    parallelize(model, engine)
    draw = torch.Generator().manual_seed(0)
    one, two = (torch.randn(2, 51, WIDTH, generator=draw, dtype=torch.float64) for _ in range(2))
    losses = [model.forward(x, packed()).square().sum() for x in (one, two)]
    losses[0].backward(retain_graph=True)
    assert len(calls) == 8 + 4 * (runs - 1)
    losses[1].backward()
    losses[0].backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    expected = initialise(Attentions(), seed=5), initialise(Attentions(), seed=5)
    for x, times in ((one, 2), (two, 1)):
        (
            times * expected[1].double()(expected[0].double()(x, packed()), packed()).square().sum()
        ).backward()
    for i, block in enumerate(expected):
        for name, parameter in block.named_parameters():
            torch.testing.assert_close(
                found[f"blocks.{i}.{name}"], parameter.grad, rtol=1e-11, atol=1e-13
            )
    assert all(leaf.kept.tape is None for leaf in model.modules() if isinstance(leaf, Softmax))


@pytest.mark.parametrize("checkpointing, runs", [("none", 1), ("full", 2)])
def test_full_checkpointing_computes_each_block_a_second_time(checkpointing, runs):
    engine = Single(Mesh.alone(), AdamW(), checkpointing=checkpointing)
    model = Chain()
    names = list(model.state_dict())
    assert parallelize(model, engine) is None  # one rank: nothing to spread
    engine.backward(engine.model(torch.ones(2, 3)).sum())
    assert [block.runs for block in model.blocks] == [runs, runs]
    assert list(engine.state()["model"]) == names


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [pytest.param("none", marks=pytest.mark.full), "full"])
def test_compiled_blocks_train_the_same_under_the_same_names(checkpointing):
    expected, expected_norms = alone()
    engine = Single(
        Mesh.alone(),
        AdamW(learning_rate=1e-2),
        precision="float64",
        checkpointing=checkpointing,
        compile=True,
    )
    model = initialise(decoder(), seed=5)
    parallelize(model, engine)
    norms = []
    for step in range(STEPS):
        tokens, targets, span = data(step)
        engine.backward(
            engine.model(MicroBatch(tokens, span, targets)).sum() / (targets != IGNORE).sum()
        )
        norms.append(engine.clip(0.1))
        engine.step(0.01)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        {name: p.detach() for name, p in engine.parameters.items()}, expected, rtol=0, atol=1e-10
    )


def spans_of_mixers(env):
    """Whether each mixer was given the very span that the model was given: layers find by it what
    others derived."""
    with torch.device("meta"):
        model = decoder()
    engine = Fsdp(build_mesh(1, env.size), AdamW(), seed=5)
    parallelize(model, engine)
    tokens, targets, span = data(0)
    same = []
    for block in engine.model.blocks:
        block.mixer.register_forward_pre_hook(lambda _, args: same.append(args[1] is span))
    for _ in range(2):  # again with the same span: what it keeps must not be walked through
        engine.backward(engine.model(MicroBatch(tokens, span, targets)).sum() / targets.numel())
    return same


def test_a_span_reaches_the_blocks_as_it_is():
    assert all(len(same) >= 2 and all(same) for same in ranks(2, spans_of_mixers))
