"""The named functions of attention against PyTorch's own, and the leaf against them."""

import pytest
import torch
from torch.nn import functional as F

from models.attention.functional import (
    attention_lse,
    attention_scores,
    attention_weights,
    context_vector,
    masked_scores,
    scaled_scores,
)
from models.kernels.blockwise import merge_partials
from models.masks.algebra import visible
from models.masks.basic import Causal, FirstTokens, SameDocument, SlidingWindow
from models.primitives.softmax import Softmax
from tests.support.parity import packed


def tensors(rows=2, tokens=51, keys=None, heads=6, kv_heads=3, width=4, values=5):
    generator = torch.Generator().manual_seed(0)
    shapes = (
        (rows, tokens, heads, width),
        (rows, keys or tokens, kv_heads, width),
        (rows, keys or tokens, kv_heads, values),
    )
    return [
        torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    ]


def attend(q, k, v, seen=None, bias=None):
    scores = masked_scores(scaled_scores(attention_scores(q, k), q.shape[-1]), seen, bias)
    return context_vector(attention_weights(scores), v)


def test_the_chain_is_pytorchs_attention():
    q, k, v = tensors(keys=17)
    seen, bias = torch.rand(2, 1, 51, 17) < 0.7, torch.randn(2, 6, 51, 17, dtype=torch.float64)
    seen[..., 0] = True
    add = bias.masked_fill(~seen, -torch.inf)
    want = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), attn_mask=add, enable_gqa=True
    )
    assert (attend(q, k, v, seen, bias) - want.transpose(1, 2)).abs().max() < 1e-12


@pytest.mark.parametrize(
    "mask",
    [
        Causal() & SameDocument(),
        SameDocument(),
        Causal() & SameDocument() & (SlidingWindow(4) | FirstTokens(2)),
    ],
)
def test_the_leaf_is_the_chain(mask):
    span = packed()
    weight = torch.randn(
        2, 51, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    results = []
    for path in (
        lambda q, k, v: attend(q, k, v, visible(mask, span, span)),
        lambda q, k, v: Softmax(mask)((q,), (k, v), span=span),
    ):
        leaves = tensors()
        out = path(*leaves)
        (out * weight).sum().backward()
        results.append([out, *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_the_mass_of_the_leaf_is_the_log_of_the_sum():
    q, k, v = tensors()
    span, mask = packed(), Causal() & SameDocument()
    scores = masked_scores(scaled_scores(attention_scores(q, k), 4), visible(mask, span, span))
    lse = Softmax(mask).partial((q,), (k, v), span=span)[1].transpose(1, 2)
    seen = visible(mask, span, span).any(-1).expand(lse.shape)
    assert (attention_lse(scores)[seen] - lse[seen]).abs().max() < 1e-12
    assert (lse[~seen] == -torch.inf).all()


def test_halves_of_the_keys_merge_by_their_mass():
    q, k, v = tensors(keys=20)
    scores = scaled_scores(attention_scores(q, k), 4)
    parts = []
    for half in (slice(0, 9), slice(9, 20)):
        some = scores[..., half]
        parts.append(
            (
                context_vector(attention_weights(some), v[:, half]),
                attention_lse(some).transpose(1, 2),
            )
        )
    assert (merge_partials(*parts)[0] - attend(q, k, v)).abs().max() < 1e-12


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
    q, k, v = tensors(tokens=3)
    seen = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(-1)
    out = attend(q, k, v, seen)
    assert (out[:, 0] == 0).all()
    out.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))
    assert (q.grad[:, 0] == 0).all()


def test_a_bias_of_minus_infinity_blinds_as_a_mask_does():
    bias = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    bias[:, :, 0] = -torch.inf
    bias.requires_grad_()
    weights = attention_weights(
        masked_scores(torch.zeros(1, 1, 3, 3, dtype=torch.float64), bias=bias)
    )
    assert (weights[:, :, 0] == 0).all()
    weights.square().sum().backward()
    assert bias.grad.isfinite().all()


def test_unit_queries_and_keys_have_scores_of_variance_one_once_scaled():
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 400, 1, 64, generator=generator) for _ in range(2))
    scores = attention_scores(q, k)
    assert scores.var() == pytest.approx(64, rel=0.05)
    assert scaled_scores(scores, 64).var() == pytest.approx(1, rel=0.05)


def test_masking_after_the_softmax_is_another_thing():
    q, k, _ = tensors()
    seen = torch.ones(51, 51, dtype=torch.bool).tril()
    scores = scaled_scores(attention_scores(q, k), 4)
    before, after = attention_weights(masked_scores(scores, seen)), attention_weights(scores) * seen
    assert (before.sum(-1) - 1).abs().max() < 1e-12
    assert after.sum(-1).min() < 0.5


def test_weights_are_float32_whatever_the_scores():
    assert attention_weights(torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert attention_weights(torch.zeros(1, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_key_heads_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="do not divide"):
        attention_scores(torch.zeros(1, 2, 4, 3), torch.zeros(1, 2, 3, 3))
