"""What lanes carry is the same whatever the ranks and micro-batches, and goes on with others."""

import pytest
import torch

from models.carried_state import REPLICATED, SHARDED
from parallel.mesh import Mesh, build_mesh
from parallel.partition import unit_ranges
from tests.support.pool import ranks
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes

ROWS, TOKENS, KEEP, HEADS = 5, 13, 9, 3


def batch(step: int) -> Batch:
    """Rows of documents of 7, 11, 15, ... tokens that go on from step to step, row by row."""
    pos, doc = [], []
    for row in range(ROWS):
        size = 7 + 4 * row
        where = torch.arange(TOKENS + 1) + step * TOKENS
        pos.append(where % size)
        doc.append(where // size - where[0] // size)
    nothing = torch.zeros(ROWS, TOKENS + 1, dtype=torch.long)
    return Batch(nothing, torch.stack(doc), torch.stack(pos), nothing)


def leave(lanes: Lanes, share: BatchSharder, step: int, rank: int, size: int) -> None:
    """What a model would leave: tokens that tell their row and place, a state of each row, one of
    each (row, head)."""
    for number, (piece, _) in enumerate(share(batch(step))):
        span = lanes.attach(number, piece.span)
        start = share.mesh.data.rank * share.rows_per_rank + number * share.micro_batch
        row = torch.arange(start, start + share.micro_batch)
        marks = (row[:, None] * 1000 + piece.span.pos + step * 0.5) * piece.span.valid()
        span.past.tokens("a", marks[..., None].double(), KEEP)
        span.past.store("b", row[:, None] * 10.0 + step, REPLICATED)
        pairs = (row[:, None] * 10.0 + torch.arange(HEADS) + step).flatten()
        span.past.store("c", pairs[slice(*unit_ranges(len(pairs), size)[rank])], SHARDED)
        lanes.advance(number)


def walk(mesh: Mesh, micro_batch: int, policy: str, state=None, first: int = 0):
    share = BatchSharder(
        mesh, rows=ROWS, context_length=TOKENS, micro_batch=micro_batch, policy=policy
    )
    lanes = Lanes(mesh, share, ROWS)
    if state is not None:
        lanes.load(state)
    for step in range(first, first + 3):
        leave(lanes, share, step, mesh.context.rank, mesh.context.size)
    return lanes.state()


def worker(env, context: int, micro_batch: int, policy: str, state):
    mesh = build_mesh(context, env.size // context)
    return walk(mesh, micro_batch, policy), walk(mesh, micro_batch, policy, state, 3)


def same(a, b) -> bool:
    return set(a) == set(b) and all(
        set(a[k]) == set(b[k]) and all(torch.equal(a[k][n], b[k][n]) for n in a[k]) for k in a
    )


@pytest.mark.parametrize(
    ("size", "context", "micro_batch", "policy"),
    [
        (2, 1, 1, "zigzag"),
        (2, 2, 2, "contiguous"),
        (3, 3, 5, "zigzag"),
        (4, 2, 2, "balanced"),
        (4, 4, 3, "balanced"),
    ],
)
def test_lanes_carry_the_same_on_any_ranks_and_go_on_on_others(size, context, micro_batch, policy):
    first = walk(Mesh.alone(), 2, "zigzag")
    second = walk(Mesh.alone(), ROWS, "zigzag", first, 3)
    assert first["9"]["doc"].ge(0).any() and not same(first, second)
    for one, two in ranks(size, worker, context, micro_batch, policy, first):
        assert same(one, first) and same(two, second)
