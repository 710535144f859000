"""Blocks that hold numbers which are not finite: what a query does not see must not reach it, not
even as NaN.

A kernel hides a key by giving it weight 0, and 0 x NaN is NaN: one overflow in a document, or
rubbish in padding, would spoil the documents beside it. Here such tokens are taken out before the
block is computed, and whatever really sees one of them is set to NaN afterwards. By the general
tile, because speed is of no concern when training has broken down.

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
    """Whether every number is finite; a sum is the quickest look, and is only doubted where it is
    not."""
    return all(bool(x.sum().isfinite()) or bool(x.isfinite().all()) for x in tensors if x.numel())


def _bad(tensors: Tensors) -> Tensor:
    """[b, t] bool: tokens with at least one number that is not finite."""
    return torch.stack([~x.isfinite().flatten(2).all(-1) for x in tensors]).any(0)


def _without(x: Tensor, bad: Tensor) -> Tensor:
    """x [b, t, ...] with zeros at bad tokens."""
    return x.masked_fill(_like(bad, x), 0)


def _like(bad: Tensor, x: Tensor) -> Tensor:
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
    """As tile.forward; the mean and the mass of a query that sees, or is, a bad token are NaN."""
    bad_q = _bad(query)
    bad_k = _bad(payload)
    clean = [_without(t, bad_q) for t in query], [_without(t, bad_k) for t in payload]
    mean, lse = reference.forward(score, mask, *clean, params, span, kv_span, heads)
    seen = visible(mask, span, kv_span, heads)
    ruined = (seen & (bad_q[:, None, :, None] | bad_k[:, None, None, :])).any(-1).transpose(1, 2)
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
    """As tile.backward; gradients of tokens that saw, or were seen by, a bad one are NaN, and those
    of the parameters."""
    bad_q = _bad([*query, d_out, delta, reference.finite_lse(lse)])
    bad_k = _bad(payload)
    clean = [_without(t, bad_q) for t in query], [_without(t, bad_k) for t in payload]
    grads = reference.backward(
        score,
        mask,
        *clean,
        params,
        span,
        kv_span,
        heads,
        d_out=_without(d_out, bad_q),
        lse=_without(lse, bad_q),
        delta=_without(delta, bad_q),
    )
    touched = visible(mask, span, kv_span, heads).any(1) & (bad_q[:, :, None] | bad_k[:, None, :])
    ruined = [touched.any(2)] * len(query) + [touched.any(1)] * len(payload)
    spoilt = [
        None if g is None else g.masked_fill(_like(r, g), torch.nan) for g, r in zip(grads, ruined)
    ]
    rest = [
        None if g is None else g.masked_fill(touched.any(), torch.nan) for g in grads[len(ruined) :]
    ]
    return spoilt + rest
