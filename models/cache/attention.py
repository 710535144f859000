"""Attention of the few queries at hand over everything that a cache holds.

No plan is made: a plan is Python over the addresses of all keys, which pays for many queries alone.

Letters: B rows, T queries, S keys, H query heads, G key heads, E value width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.cache.base import KVCache
from models.cache.contiguous import ContiguousCache
from models.kernels import blockwise, reference, sdpa_cpu
from models.kernels.backends import select_kernel
from models.kernels.reference import Partial
from models.masks.algebra import visible
from models.primitives.softmax import attention_spec, head_count, value_width
from models.scores import Score, Tensors
from models.span import DerivedCache, Span

FEW = 8  # queries of a row up to which no plan is made


def attend(
    spec: blockwise.AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    *,
    span: Span,
    kv_span: Span,
) -> Partial:
    """Returns (mean [B, T, H, E], lse [B, T, H] in nats), wide, without the sink of the score.

    Args:
        spec: the score under its mask.
    """
    keys = payload[0].shape[1]
    if not keys or span.shape[1] > FEW:
        width = value_width(spec.score, payload, params, query)
        total = blockwise.empty_partial(query, len(spec.heads), width)
        if keys:
            blockwise.forward(spec, query, payload, params, span, kv_span, total)
        return total
    kernel = select_kernel(query[0].device, query[0].dtype, spec.score)
    if kernel is None:
        return reference.forward(
            spec.score, spec.mask, query, payload, params, span, kv_span, spec.heads
        )
    q, k, v = spec.score.operands(query, payload, params)
    add = _added(spec, span, kv_span, q.dtype)
    repeats = q.shape[2] // k.shape[2]
    if repeats == 1:
        return kernel.forward(q, k, v, spec.score.scale(q), False, add)
    # A kernel reads the keys once for each query head. As queries of one head they read them once.
    folded = folded_queries(q, repeats)
    if add is not None:
        add = _folded_addend(add, repeats)
    mean, lse = kernel.forward(folded, k, v, spec.score.scale(q), False, add)
    return unfolded_queries(mean, repeats), unfolded_queries(lse, repeats)


def numbered_heads(score: Score, query: Tensors, span: Span) -> Tensor:
    """Returns the numbers of all heads; layers with as many share them."""
    count = head_count(score, query)
    device = query[0].device
    return span.cache.get(("heads", count), lambda: torch.arange(count, device=device))


def folded_queries(q: Tensor, repeats: int) -> Tensor:
    """[B, T, G R, D] -> [B, T R, G, D]: the R query heads of a key head become queries."""
    if q.shape[1] == 1:  # a view: one token's heads are in this order already
        return q.reshape(q.shape[0], -1, repeats, q.shape[3]).transpose(1, 2)
    return q.unflatten(2, (-1, repeats)).transpose(2, 3).flatten(1, 2)


def unfolded_queries(x: Tensor, repeats: int) -> Tensor:
    """[B, T R, G, ...] -> [B, T, G R, ...]: the reverse of `folded_queries`."""
    if x.shape[1] == repeats:
        return x.transpose(1, 2).flatten(1, 2)[:, None]
    return x.unflatten(1, (-1, repeats)).transpose(2, 3).flatten(2, 3)


def _folded_addend(add: Tensor, repeats: int) -> Tensor:
    """[B, 1 or G R, T, S] -> [B, 1 or G, T R, S], for queries that were folded."""
    if add.shape[1] == 1:
        return add.repeat_interleave(repeats, 2)
    return add.unflatten(1, (-1, repeats)).transpose(2, 3).flatten(2, 3)


def _added(
    spec: blockwise.AttentionSpec, span: Span, kv_span: Span, dtype: torch.dtype
) -> Tensor | None:
    """Returns [B or 1, H or 1, T, S] to add to the logits; None where every query sees every key.

    Layers with the same mask and no bias share it.
    """
    seen = seen_keys(spec, span, kv_span)
    bias = None
    if spec.score.biased:
        wide = reference.accumulation_dtype(dtype)
        bias = spec.score.bias(span, kv_span, spec.heads, wide)
    if bias is not None:
        return torch.where(seen[0], bias, -torch.inf)
    if seen[1]:
        return None
    key = ("added", spec.mask, len(spec.heads), dtype)
    return span.cache.get(key, lambda: torch.where(seen[0], 0.0, -torch.inf).to(dtype), kv_span)


def seen_keys(spec: blockwise.AttentionSpec, span: Span, kv_span: Span) -> tuple[Tensor, bool]:
    """Returns ([B, 1 or H, T, S] bool, whether all of it is true); kept for other layers."""

    def build() -> tuple[Tensor, bool]:
        seen = visible(spec.mask, span, kv_span, spec.heads)
        return seen, bool(seen.all())

    return span.cache.get(("seen", spec.mask, len(spec.heads)), build, kv_span)


class HiddenKeys(NamedTuple):
    """Keys that are hidden from one query a row.

    Attributes:
        add: [B, 1, 1, S] to add to the logits; None where every query sees every key.
        every_query_sees: no query is blind; no head differs from another.
    """

    add: Tensor | None
    every_query_sees: bool


def attend_one(
    softmax: Any, cache: KVCache, q: Tensor, span: Span, hidden: DerivedCache
) -> Partial | None:
    """Attends one query a row, [B, 1, H, D], by the shortest way; None where it is not open.

    Args:
        softmax: the primitive, with a score that is a scaled dot product and nothing more.
        cache: has taken the tokens at hand.
        hidden: what layers that share slots have found out in this pass.
    """
    if type(cache) is not ContiguousCache:
        return None
    (keys, values), kv_span = cache.read()

    def build() -> HiddenKeys:
        spec = attention_spec(softmax.mask, softmax.score, (q,), None)
        return _hidden_from_one(spec, span, kv_span, q.dtype)

    found = hidden.get("hidden", build, cache.slots)
    if not found.every_query_sees or not sdpa_cpu.takes_one(q, keys, values):
        return None
    return sdpa_cpu.forward_one(q, keys, values, softmax.score.scale(q), found.add)


def _hidden_from_one(
    spec: blockwise.AttentionSpec, span: Span, kv_span: Span, dtype: torch.dtype
) -> HiddenKeys:
    """Returns what is hidden from the queries of `span`, one a row."""
    if not kv_span.shape[1]:
        return HiddenKeys(None, False)
    seen, everything = seen_keys(spec, span, kv_span)
    if everything:
        return HiddenKeys(None, True)
    sighted = seen.shape[1] == 1 and bool(seen.any(-1).all())
    return HiddenKeys(torch.where(seen, 0.0, -torch.inf).to(dtype), sighted)


def weights(
    spec: blockwise.AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    *,
    span: Span,
    kv_span: Span,
) -> Tensor:
    """Returns the weights after the softmax, [B, H, T, S] wide; a sink takes its share."""
    dtype = reference.accumulation_dtype(query[0].dtype)
    query, payload, params = (_cast(tensors, dtype) for tensors in (query, payload, params))
    logits = spec.score.logits(query, payload, params, span, kv_span, spec.heads)
    seen, _ = seen_keys(spec, span, kv_span)
    logits = logits.masked_fill(~seen, -torch.inf)
    sink = spec.score.sink(params)
    lse = logits.logsumexp(-1)
    if sink is not None:
        lse = torch.logaddexp(lse, sink.to(dtype)[None, :, None])
    return (logits - reference.finite_lse(lse)[..., None]).exp()


def _cast(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return [tensor.to(dtype) for tensor in tensors]


def split_heads(tensors: Tensors, groups: int) -> Tensors:
    """Turns key heads into rows: [B, T, H, ...] -> [B G, T, H / G, ...].

    For caches whose heads hold different tokens (`KVCache.per_head`).
    """
    split = []
    for tensor in tensors:
        by_group = tensor.unflatten(2, (groups, -1)).transpose(1, 2)
        split.append(by_group.flatten(0, 1))
    return split


def joined_heads(x: Tensor, groups: int) -> Tensor:
    """[B G, T, H / G, ...] -> [B, T, H, ...]: the reverse of `split_heads`."""
    by_group = x.unflatten(0, (-1, groups)).transpose(1, 2)
    return by_group.flatten(2, 3)


def repeated_rows(span: Span, groups: int) -> Span:
    """Returns the addresses with every row `groups` times, [B G, T]; the same object when asked
    again."""

    def build() -> Span:
        return span.map(lambda addresses: addresses.repeat_interleave(groups, 0))

    return span.cache.get(("split heads", groups), build)
