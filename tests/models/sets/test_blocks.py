"""SAB, ISAB and PMA: what they compute does not depend on the order of a set, on the other sets of
a row, or on the ranks that share it."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from models.init import initialise
from models.sets.blocks import (
    InducedSetAttentionBlock,
    PoolingByMultiheadAttention,
    SeedAttentionBlock,
    SetAttentionBlock,
)
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks

WIDTH, HEADS = 12, 3
TOKENS = 29
LENGTHS = [[9, 1, 12], [3, 17, 1, 4]]  # sets of a row, uneven, some of a single element
FEW = [[2, 1], [3]]  # over three ranks and contiguously, some rank holds padding alone


class Pooled(nn.Module):
    """PMA and a block over its seeds, each element given the seeds of its set."""

    def __init__(self, seeds: int = 2):
        super().__init__()
        self.pool = PoolingByMultiheadAttention(WIDTH, HEADS, seeds)
        self.seeds = SeedAttentionBlock(WIDTH, HEADS)

    def forward(self, x, span):
        pooled, points = self.pool(x, span)
        seeds = self.seeds(pooled, points).unflatten(1, (-1, points.count)).flatten(2)
        index = points.document[..., None].expand(-1, -1, seeds.shape[2])
        return seeds.gather(1, index)[..., ::2]


LAYERS = {
    "SAB": lambda: SetAttentionBlock(WIDTH, HEADS),
    "SAB, paper's scale": lambda: SetAttentionBlock(WIDTH, HEADS, logit_scale="width"),
    "ISAB": lambda: InducedSetAttentionBlock(WIDTH, HEADS, 4),
    "ISAB without norms": lambda: InducedSetAttentionBlock(WIDTH, HEADS, 4, norm=False),
    "PMA": Pooled,
}


def built(name):
    return initialise(LAYERS[name](), seed=3).double()


def drawn(span, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", LAYERS)
def test_the_order_of_a_set_makes_no_difference(name):
    layer, x = built(name), drawn(Span.line(1, 11))
    order = torch.randperm(11, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        want = layer(x, Span.line(1, 11))
        got = layer(x[:, order], Span.line(1, 11))
    assert (want.std(1) > 1e-2).any() or name == "PMA", "elements differ"
    assert (got - want[:, order]).abs().max() < 1e-12


def test_a_pooled_set_is_invariant_and_says_which_set_it_was():
    layer, span = built("PMA"), packed(LENGTHS, TOKENS)
    x = drawn(span)
    with torch.no_grad():
        out = layer(x, span)
        assert (out[0, :9] - out[0, :1]).abs().max() < 1e-12, "one answer a set"
        assert (out[0, 9] - out[0, 0]).abs().max() > 1e-2, "another for the next"
        x[0, 4] += 1
        moved = (layer(x, span) - out).abs().amax(-1)
    assert (moved[0, :9] > 1e-6).all()
    assert moved[0, 9:22].max() == 0 and moved[1].max() == 0


@pytest.mark.parametrize("name", LAYERS)
def test_a_set_in_a_packed_row_is_that_set_alone(name):
    layer, span = built(name), packed(LENGTHS, TOKENS)
    x = drawn(span)
    with torch.no_grad():
        out = layer(x, span)
        alone = layer(x[1:, 3:20], Span.line(1, 17))
    assert (out[1, 3:20] - alone[0]).abs().max() < 1e-12


def over_ranks(env, name, lengths, policy):
    """Worst relative difference of outputs and of all gradients."""
    span = packed(lengths, TOKENS)
    x, weight = drawn(span), drawn(span, 2) * span.valid()[..., None]
    one, many = built(name), built(name)
    whole = x.clone().requires_grad_()
    want = one(whole, span)
    weight = weight[..., : want.shape[2]]
    (want * weight).sum().backward()

    names = list(many.state_dict())
    apply_context_parallel(many, env.group, "ring")
    assert list(many.state_dict()) == names
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard, valid = here.sharding.shard, here.valid()[..., None]
    part = shard(x, 0).requires_grad_()
    got = many(part, here)
    assert got.isfinite().all()
    (got * shard(weight, 0)).sum().backward()
    worst = [relative(got * valid, shard(want.detach(), 0) * valid)]
    worst.append(relative(part.grad * valid, shard(whole.grad, 0) * valid))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        dist.all_reduce(b.grad, group=env.group)
        # A gradient that is rounding alone is compared in absolute terms.
        worst.append(min(relative(b.grad, a.grad), float((b.grad - a.grad).abs().max())))
    return max(worst)


@pytest.mark.parametrize(
    ("size", "policy", "lengths"),
    [
        (2, "zigzag", LENGTHS),
        (3, "contiguous", LENGTHS),
        (3, "contiguous", FEW),
        (4, "balanced", LENGTHS),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_sharing_a_set_over_ranks_is_invisible(name, size, policy, lengths):
    assert max(ranks(size, over_ranks, name, lengths, policy)) < 1e-11


def sent(env, elements):
    span = packed([[elements]], elements)
    layer = built("PMA")
    communicator = apply_context_parallel(layer, env.group, "ring")
    here = shard_span(span, layouts("contiguous", span, env.size), env.rank)
    layer(here.sharding.shard(drawn(span), 0), here).sum().backward()
    return communicator.bytes_sent


def test_what_is_sent_does_not_grow_with_the_set():
    """(P - 1) B N H (E + 1) numbers forward and without the mass backward."""
    few, many = (ranks(3, sent, elements)[0] for elements in (9, 90))
    assert few == many == {"pool": 2 * 2 * 3 * 5 * 8, "pool backward": 2 * 2 * 3 * 4 * 8}


def test_sizes_that_make_no_block_are_refused():
    with pytest.raises(ValueError, match="choose a multiple of 5"):
        SetAttentionBlock(WIDTH, 5)
    with pytest.raises(ValueError, match=r"model\.points=0"):
        InducedSetAttentionBlock(WIDTH, HEADS, 0)
    with pytest.raises(ValueError, match=r"model\.seeds=0"):
        PoolingByMultiheadAttention(WIDTH, HEADS, 0)
