"""Cross-attention: a source of another length, on one device and cut over ranks by a layout of its
own."""

import pytest
import torch
import torch.distributed as dist

from models.attention.cross import CrossAttention
from models.attention.functional import (
    attention_scores,
    attention_weights,
    context_vector,
    masked_scores,
    scaled_scores,
)
from models.init import initialise
from models.masks.algebra import visible
from models.masks.basic import SameDocument
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layout
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks

WIDTH, HEADS, KV, OTHER = 24, 6, 3, 10
SOURCE = [
    [4, 8, 5],
    [21, 2, 7],
]  # fewer documents in row 0 than the sequence has: its last one has no source


def given(dtype=torch.float64):
    layer = initialise(CrossAttention(WIDTH, HEADS, KV, source_width=OTHER), seed=1).to(dtype)
    span, kv_span, generator = packed(), packed(SOURCE, 31), torch.Generator().manual_seed(7)
    x = torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype) * 10
    source = (
        torch.randn(*kv_span.shape, OTHER, generator=generator, dtype=torch.float64).to(dtype) * 10
    )
    weight = (
        torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        * span.valid()[..., None]
    )
    return layer, x.requires_grad_(), span, source.requires_grad_(), kv_span, weight


def test_every_token_sees_the_whole_source_of_its_document():
    layer, x, span, source, kv_span, _ = given()
    q, k, v = (
        f(t).unflatten(-1, (-1, 4)) for f, t in ((layer.q, x), (layer.k, source), (layer.v, source))
    )
    scores = masked_scores(
        scaled_scores(attention_scores(q, k), 4), visible(SameDocument(), span, kv_span)
    )
    want = layer.out(context_vector(attention_weights(scores), v).flatten(-2))
    got = layer(x, span, source, kv_span)
    assert (got - want).abs().max() < 1e-12
    assert (got[0, 38:47] == 0).all(), "a document without a source gets zeros"
    assert torch.equal(layer.attend(x, span, layer.remember(source), kv_span), got)


def cut(env, method, policy, dtype):
    """Worst relative difference of the output and of all gradients."""
    one, x, span, source, kv_span, weight = given(dtype)
    want = one(x, span, source, kv_span)
    (want * weight).sum().backward()
    many, *_ = given(dtype)
    apply_context_parallel(many, env.group, method)
    here, there = (
        shard_span(s, [layout(policy, s.shape[1], env.size)], env.rank) for s in (span, kv_span)
    )
    part, piece = (
        here.sharding.shard(x.detach(), 0).requires_grad_(),
        there.sharding.shard(source.detach(), 0).requires_grad_(),
    )
    got = many(part, here, piece, there)
    (got * here.sharding.shard(weight, 0)).sum().backward()
    valid = here.valid()[..., None]
    worst = [relative(got * valid, here.sharding.shard(want.detach(), 0) * valid)]
    worst += [
        relative(part.grad, here.sharding.shard(x.grad, 0)),
        relative(piece.grad, there.sharding.shard(source.grad, 0)),
    ]
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        dist.all_reduce(b.grad, group=env.group)
        worst.append(relative(b.grad, a.grad))
    return max(worst)


@pytest.mark.parametrize(
    ("method", "policy", "size"),
    [
        ("ring", "zigzag", 3),
        ("ring", "contiguous", 2),
        ("ulysses", "zigzag", 2),
        ("ulysses", "contiguous", 3),
        ("allgather", "contiguous", 3),
    ],
)
def test_a_cut_of_both_sequences_is_invisible(method, policy, size):
    assert max(ranks(size, cut, method, policy, torch.float64)) < 1e-11
    assert max(ranks(size, cut, method, policy, torch.float32)) < 2e-5


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 5"):
        CrossAttention(WIDTH, 5, 5)
    with pytest.raises(ValueError, match="divisor of 6"):
        CrossAttention(WIDTH, 6, 4)
