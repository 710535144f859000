"""The formulas of parallel/traffic.py are what the wire counts, and no rank keeps more the more
ranks there are."""

import pytest
import torch

from models.attention.full import CAUSAL
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.span import Span
from parallel import traffic
from parallel.collectives import Communicator
from parallel.context_parallel import METHODS
from parallel.drivers.key_exchange import gather_plan
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import GRID_HEADS, grid, packed
from tests.support.pool import ranks

MASK = CAUSAL & SlidingWindow(9)


def exchange(env, method, heads, kv_heads, dtype, span, policy="zigzag"):
    """(bytes sent forward, sent in all, elements saved for backward, formula) of one attention on
    this rank."""
    communicator, side = Communicator(env.group), GRID_HEADS[env.size]
    if method == "usp":
        communicator.add_grid(*grid(env, side))
        communicator.heads = side
    driver = METHODS[method](Softmax(MASK), communicator)
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shapes = (heads, 4), (kv_heads, 4), (kv_heads, 3)
    q, k, v = (torch.randn(*here.shape, *shape).to(dtype).requires_grad_() for shape in shapes)
    saved = {}

    def keep(x):
        if (
            x.is_floating_point()
        ):  # indices belong to the Cut, which holds the addresses of the row once for all layers
            saved[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        mean = driver((q,), (k, v), span=here)
    forward = sum(communicator.bytes_sent.values())
    mean.sum().backward()
    streams = [traffic.tensor_spec(t, 2) for t in (q, k, v)]
    job = traffic.AttentionShape(
        here.pos.numel(),
        here.pos.numel(),
        (streams[0],),
        tuple(streams[1:]),
        streams[0]._replace(width=3),
    )
    if method == "allgather":
        plan = gather_plan(MASK, here, here, torch.arange(heads))
        formula = traffic.allgather_traffic(job, [len(g) for g in plan.gives], plan.takes, env.rank)
    elif method == "usp":
        formula = traffic.usp_traffic(job, side, env.size // side, env.rank % side)
    else:
        formula = (
            traffic.ring_traffic(job, env.size)
            if method == "ring"
            else traffic.ulysses_traffic(job, env.size, env.rank)
        )
    return forward, sum(communicator.bytes_sent.values()), sum(saved.values()), formula


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_sent_are_those_of_the_formula(method, size):
    for heads, kv_heads, dtype in (
        (6, 6, torch.float64),
        (6, 2, torch.float32),
        (4, 1, torch.float32),
        (5, 5, torch.bfloat16),
    ):
        for forward, total, _, formula in ranks(
            size, exchange, method, heads, kv_heads, dtype, packed()
        ):
            assert forward == formula.forward
            assert total == formula.total
            assert total > 0


@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_does_not_grow_with_the_ranks(method):
    """The same number of tokens on each rank, so twice the sequence on twice the ranks: what is
    saved stays the same."""
    few, many = (
        ranks(size, exchange, method, 4, 4, torch.float32, Span.line(1, 16 * size))
        for size in (2, 4)
    )
    assert max(each[2] for each in many) <= max(each[2] for each in few)


def test_a_window_fetches_its_reach_and_nothing_else():
    """Each rank but the last gives its last 8 tokens to the next rank, whatever the length."""
    for length in (60, 120):
        sent = [
            each[0]
            for each in ranks(
                3, exchange, "allgather", 2, 2, torch.float32, Span.line(1, length), "contiguous"
            )
        ]
        assert sent == [8 * 2 * (4 + 3) * 4] * 2 + [0]


def test_ring_and_heads_by_hand():
    """10 tokens on each of 4 ranks, 8 heads, 2 key heads, width 16 and 16, bfloat16."""
    q, kv = traffic.TensorSpec(16, 8, 2), traffic.TensorSpec(16, 2, 2)
    job = traffic.AttentionShape(10, 10, (q,), (kv, kv), q)
    assert traffic.ring_traffic(job, 4) == (3 * 10 * 2 * 2 * 16 * 2, 3 * 10 * 2 * 2 * 16 * (2 + 4))
    # each rank computes 2 heads, which read 1 key head
    assert traffic.ulysses_traffic(job, 4) == (3 * 10 * 16 * 2 * (2 + 1 + 1 + 2),) * 2
    traded = 10 * 16 * 2 * (4 + 1 + 1 + 4)
    assert traffic.usp_traffic(job, 2, 2) == (
        traded + 20 * 2 * 16 * 2,
        traded + 20 * 2 * 16 * (2 + 4),
    )


def test_the_cheapest_way_is_chosen_and_the_reason_given():
    q, one, many = (
        traffic.TensorSpec(64, 8, 4),
        traffic.TensorSpec(64, 1, 4),
        traffic.TensorSpec(64, 8, 4),
    )

    def chosen(kv, count, share=1.0, **rest):
        method, side, why = traffic.choose_method(
            traffic.AttentionShape(1024, 1024, (q,), (kv, kv), q), count, share, **rest
        )
        return method, side, why

    assert chosen(many, 4, 0.03) == ("allgather", 1, "its mask needs 3% of the other ranks' keys")
    assert chosen(many, 4)[:2] == ("ulysses", 4)
    assert "8 heads divide among 4 ranks" in chosen(many, 4)[2]
    assert chosen(one, 2)[0] == "ring", "one key head costs the ring next to nothing"
    assert chosen(many, 3)[0] == "ring" and "do not divide among 3 ranks" in chosen(many, 3)[2]
    assert chosen(many, 16)[:2] == ("usp", 8)
    assert chosen(many, 16, grid=4)[:2] == ("usp", 4)
    assert chosen(many, 4, trade=False) == ("ring", 1, "its heads cannot be traded")
