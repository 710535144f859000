"""Losses, gradients and evaluations of an objective on three ranks are those of one device, under
every layout."""

import pytest
import torch
import torch.distributed as dist

from models.architectures.decoder import Decoder
from models.attention.bidirectional import Bidirectional
from models.attention.longformer import Longformer
from models.attention.prefix import PrefixAttention
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.positions.t5 import T5
from models.recurrent.gated_linear import GatedLinear
from models.span import PADDING
from parallel.context_parallel import apply_context_parallel
from parallel.layout import POLICIES
from parallel.mesh import Mesh, build_mesh
from tests.support.pool import ranks
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.tokenizers import Bytes
from trainer.evaluation.held_out import evaluate
from trainer.objectives.masked import Masked
from trainer.objectives.span_corruption import SpanCorruption

LENGTH = 83
OBJECTIVES = {"masked": Masked(probability=0.3), "span": SpanCorruption(noise_density=0.3)}
LAYERS = {
    "masked": lambda: [
        Bidirectional(16, 4, 2, T5(8, 20, bidirectional=True)),
        Longformer(16, 4, 4, Rope(), 1, 2, window=5, first=2, symmetric=True),
    ],
    "span": lambda: [PrefixAttention(16, 4, 2, Rope(), length=0), GatedLinear(16, 4, rank=5)],
}
LENGTHS = [
    [40, 1, 29],
    [3, 60, 1, 1],
    [64],
    [],
]  # documents of four rows: uneven, of a single token, and a row of padding


def text(read):
    """[4, read + 1] rows of these documents, as far as they fit."""
    tokens = torch.randint(0, 256, (4, read + 1), generator=torch.Generator().manual_seed(5))
    doc, pos = torch.full_like(tokens, PADDING), torch.zeros_like(tokens)
    for row, sizes in enumerate(LENGTHS):
        here = 0
        for number, size in enumerate(sizes):
            part = slice(here, min(here + size, read + 1))
            doc[row, part], pos[row, part] = number, torch.arange(part.stop - part.start)
            here = part.stop
    return Batch(tokens, doc, pos, torch.zeros_like(tokens))


def batch(name):
    objective = OBJECTIVES[name]
    symbols = objective.symbols(Bytes(), LENGTH)
    return objective.apply(text(objective.reads(LENGTH)), torch.arange(4), 0, symbols, LENGTH)


def model(name):
    layers = LAYERS[name]()
    vocabulary = OBJECTIVES[name].symbols(Bytes(), LENGTH).vocabulary
    return initialise(
        Decoder(vocabulary, 16, layers, [SwiGLU(16, 24) for _ in layers], init_std=0.2), 5
    ).double()


class Once:
    """A stream of one batch."""

    batches = 1
    fingerprint = "one batch"

    def __init__(self, name):
        self.name = name

    def start(self):
        return {}

    def read(self, cursor):
        return batch(self.name), cursor


def learned(name, mesh, policy, micro_batch, context):
    """(loss, count of targets, gradients, evaluation), summed over ranks."""
    one = model(name)
    if context > 1:
        apply_context_parallel(one, mesh.context.group, "ring")
    share = BatchSharder(
        mesh, rows=4, context_length=LENGTH, micro_batch=micro_batch, policy=policy
    )
    valid, total = share.valid(batch(name)), torch.zeros((), dtype=torch.float64)
    for piece, _ in share(batch(name)):
        loss = one(MicroBatch(piece.tokens, piece.span, piece.targets)).sum() / valid
        loss.backward()
        total += loss.detach()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()]
    if mesh.world.group is not None:
        for x in (total, *grads):
            dist.all_reduce(x, group=mesh.world.group)
    return total, valid, grads, evaluate(one, share, Once(name), 1, lambda row, point: False)


def in_rank(env, name, policy, micro_batch, context):
    return learned(name, build_mesh(context, env.size // context), policy, micro_batch, context)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("policy", "micro_batch", "context"),
    [*((policy, 1, 3) for policy in POLICIES), ("zigzag", 2, 1)],
)
def test_three_ranks_learn_what_one_device_learns(name, policy, micro_batch, context):
    loss, valid, grads, seen = learned(name, Mesh.alone(), "zigzag", "auto", 1)
    assert valid == int((batch(name).targets() != IGNORE).sum()) > 20
    for other_loss, other_valid, other_grads, other_seen in ranks(
        3, in_rank, name, policy, micro_batch, context
    ):
        assert other_valid == valid and abs(other_loss - loss) < 1e-12
        for a, b in zip(grads, other_grads, strict=True):
            assert (a - b).abs().max() < 1e-11 * max(1.0, a.abs().max().item())
        assert (
            other_seen.tokens == seen.tokens == valid and abs(other_seen.loss - seen.loss) < 1e-12
        )
        assert [each["tokens"] for each in other_seen.by_position] == [
            each["tokens"] for each in seen.by_position
        ]
    assert (
        abs(seen.loss - loss) < 1e-12 and sum(each["tokens"] for each in seen.by_position) == valid
    )


def test_under_masked_a_token_learns_from_both_sides():
    """Hidden tokens answer to what stands behind them, and never to what they hide."""
    given, one = batch("masked"), model("masked")
    place = (given.targets()[0] != IGNORE).nonzero()[0, 0]
    moved = given.tokens.clone()
    moved[0, place + 2] = (moved[0, place + 2] + 1) % 256
    with torch.no_grad():
        before, after = (
            one(MicroBatch(given._replace(tokens=tokens).inputs(), given.span()))
            for tokens in (given.tokens, moved)
        )
    assert (before[0, place] - after[0, place]).abs().max() > 1e-9


def test_under_span_corruption_the_input_sees_itself_from_both_sides_and_none_of_the_answer():
    given, one = batch("span"), model("span")
    role, aims = given.role[2], given.aims[2]
    first = int((aims != IGNORE).nonzero()[0, 0])  # the last token of the input
    assert (role[: first + 1] == 1).all() and (role[first + 1 : 70] == 0).all()
    attention = torch.nn.ModuleList([one.blocks[0]])
    with torch.no_grad():
        x = one.embed(given.inputs())
        other = x.clone()
        other[2, first] += 1.0
        seen = (attention[0](x, given.span()) - attention[0](other, given.span()))[2].abs().amax(-1)
        later = x.clone()
        later[2, first + 5] += 1.0
        hidden = (
            (attention[0](x, given.span()) - attention[0](later, given.span()))[2].abs().amax(-1)
        )
    assert (
        (seen[:first] > 1e-12).all()
        and (hidden[: first + 5] < 1e-15).all()
        and hidden[first + 5] > 0
    )
