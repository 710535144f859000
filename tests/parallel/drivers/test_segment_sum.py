"""Tally over ranks gives what it gives on one device, in every layout, and sends what the formula
says."""

import pytest
import torch
import torch.distributed as dist

from models.primitives.segment_sum import SegmentSum
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.segment_sum import ShardedSegmentSum
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.parity import packed
from tests.support.pool import ranks

HOLES = torch.tensor(
    [
        [0] * 5 + [-1] * 8 + [0] * 9 + [-1] * 3 + [1] * 4 + [-1] * 7 + [1] * 9,
        [-1] * 12 + [0] * 20 + [-1] * 13,
    ]
)

SPANS = {
    "holed": Span.of((HOLES >= 0).cumsum(1), HOLES),  # padding wherever a rank may come to hold it
    "packed": packed(),
    "one document": Span.line(2, 51),
    "single tokens": packed([[1] * 40, [50]]),
    "one token": packed([[1], []], 1),
    "empty": packed([[], []], 7),
}


def tallied(env, name, policy, over, features):
    span = SPANS[name]
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-9, 9, (*span.shape, *features), generator=generator)
    communicator = Communicator(env.group)
    many, here = (
        ShardedSegmentSum(SegmentSum(), communicator),
        shard_span(span, layouts(policy, span, env.size), env.rank),
    )
    shard, valid = here.sharding.shard, here.valid()
    for get in ("total", "before"):
        want = getattr(SegmentSum(), get)(whole, span, over).expand_as(whole)
        got = getattr(many, get)(shard(whole, 0), here, over)
        assert torch.equal(got.expand(*here.shape, *features)[valid], shard(want, 0)[valid]), get
        real = whole.double().requires_grad_()
        weight = (
            torch.randn(real.shape, generator=generator, dtype=torch.float64)
            * span.valid()[(...,) + (None,) * len(features)]
        )
        (getattr(SegmentSum(), get)(real, span, over) * weight).sum().backward()
        part = shard(whole, 0).double().requires_grad_()
        (getattr(many, get)(part, here, over) * shard(weight, 0)).sum().backward()
        torch.testing.assert_close(
            part.grad[valid], shard(real.grad, 0)[valid], rtol=0, atol=1e-12, msg=get
        )
    runs = max(len(r) for layout in here.sharding.layouts for r in layout.runs)
    each = 8 * span.shape[0] * 2 * runs * (env.size - 1) * torch.Size(features).numel()
    assert communicator.bytes_sent == {"tally": 4 * each, "tally backward": 2 * each}
    dist.barrier(group=env.group)
    return True


@pytest.mark.parametrize("over", ["row", "document"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", SPANS)
def test_where_the_tokens_lie_is_invisible(name, policy, over):
    for size, features in ((2, (3,)), (3, ()), (4, (2, 2))):
        assert all(ranks(size, tallied, name, policy, over, features))


def test_two_sums_a_run_are_enough_for_any_length():
    """What is sent is the same for a row ten times as long."""
    few, many = (ranks(3, sent, length) for length in (60, 600))
    assert few == many and few[0] > 0


def sent(env, length):
    communicator, span = Communicator(env.group), packed([[5] * (length // 5)], length)
    here = shard_span(span, layouts("zigzag", span, env.size), env.rank)
    ShardedSegmentSum(SegmentSum(), communicator).before(here.pos, here, "document")
    return sum(communicator.bytes_sent.values())
