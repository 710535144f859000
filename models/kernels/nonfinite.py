"""Blocks with numbers that are not finite: hidden tokens must not reach a query, not even as NaN.

A kernel hides a key by giving it weight 0, and 0 x NaN is NaN: one overflow in a document, or
rubbish in padding, would spoil other documents. Here such tokens are taken out before the block is
computed, and every query that really sees one of them is set to NaN afterwards. The reference
kernel computes them: speed does not matter once training has broken down. On a GPU nobody looks, as
the answer would have to be waited for in every block: there such a number may reach other queries
of its block, and the step is skipped or refused by its loss all the same.

Letters: b rows, t queries, s keys, H heads.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from models.kernels import reference
from models.masks.algebra import Mask, visible
from models.scores import Score, Tensors
from models.span import Span


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns whether every number of every tensor is finite."""
    for tensor in tensors:
        # A sum is the quickest look. It may overflow although all numbers are finite, so a bad sum
        # only raises a doubt.
        doubtful = tensor.numel() > 0 and not bool(tensor.sum().isfinite())
        if doubtful and not bool(tensor.isfinite().all()):
            return False
    return True


def _bad_tokens(tensors: Tensors) -> Tensor:
    """Returns the tokens with at least one number that is not finite, [b, t] bool."""
    bad = [~tensor.isfinite().flatten(2).all(-1) for tensor in tensors]
    return torch.stack(bad).any(0)


def _without(x: Tensor, bad: Tensor) -> Tensor:
    """Replaces bad tokens of x [b, t, ...] by zeros."""
    return x.masked_fill(_per_feature(bad, x), 0)


def _per_feature(bad: Tensor, x: Tensor) -> Tensor:
    return bad.view(*bad.shape, *[1] * (x.dim() - 2))


def forward(
    score: Score,
    mask: Mask,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    heads: Tensor,
) -> reference.Partial:
    """As reference.forward; mean and lse of a query that sees, or is, a bad token are NaN."""
    bad_queries = _bad_tokens(query)
    bad_keys = _bad_tokens(payload)
    clean_query = [_without(tensor, bad_queries) for tensor in query]
    clean_payload = [_without(tensor, bad_keys) for tensor in payload]
    mean, lse = reference.forward(
        score, mask, clean_query, clean_payload, params, span, kv_span, heads
    )
    seen = visible(mask, span, kv_span, heads)
    bad_pair = bad_queries[:, None, :, None] | bad_keys[:, None, None, :]
    ruined = (seen & bad_pair).any(-1).transpose(1, 2)
    return mean.masked_fill(ruined[..., None], torch.nan), lse.masked_fill(ruined, torch.nan)


def backward(
    score: Score,
    mask: Mask,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    heads: Tensor,
    *,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> list[Tensor | None]:
    """As reference.backward; gradients of tokens that saw, or were seen by, a bad one are NaN.

    So are those of the parameters.
    """
    bad_queries = _bad_tokens([*query, d_out, delta, reference.finite_lse(lse)])
    bad_keys = _bad_tokens(payload)
    gradients = reference.backward(
        score,
        mask,
        [_without(tensor, bad_queries) for tensor in query],
        [_without(tensor, bad_keys) for tensor in payload],
        params,
        span,
        kv_span,
        heads,
        d_out=_without(d_out, bad_queries),
        lse=_without(lse, bad_queries),
        delta=_without(delta, bad_queries),
    )
    seen_by_a_head = visible(mask, span, kv_span, heads).any(1)
    touched = seen_by_a_head & (bad_queries[:, :, None] | bad_keys[:, None, :])
    ruined_queries = touched.any(2)
    ruined_keys = touched.any(1)
    ruined_tokens = [ruined_queries] * len(query) + [ruined_keys] * len(payload)
    results: list[Tensor | None] = []
    for number, gradient in enumerate(gradients):
        if gradient is None:
            results.append(None)
            continue
        if number < len(ruined_tokens):
            ruined = _per_feature(ruined_tokens[number], gradient)
        else:
            ruined = touched.any()  # a parameter: every query uses it
        results.append(gradient.masked_fill(ruined, torch.nan))
    return results
