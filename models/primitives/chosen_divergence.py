"""The distance of an indexer's scores from the attention weights that they predict.

Over the blocks that a query has chosen: the weights are computed once, and backward reads the index
keys of these blocks alone.

Letters: B rows, T queries, N summaries, K chosen blocks, H heads, I index heads, C channels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from models.kernels.pairs import readings
from models.kernels.pairs.block_lookup import BlockLookup
from models.kernels.workspace import Workspace
from models.primitives.block_topk import take
from models.scores import Tensors
from models.span import Span

HIDDEN = 1e30  # how far below others the logit of a block is that is not seen
CHUNK_NUMBERS = 1 << 20  # numbers of the gathered entries of a chunk of queries


def index_scores(query: Tensors, keys: Tensors) -> Tensor:
    """Scores summaries, [B, T, N]: sum over index heads of weight x relu(q k) / sqrt(C).

    Args:
        query: (q [B, T, I, C], weight [B, T, I]).
        keys: (k [B, N, C],).
    """
    index_query, weight = query
    (index_key,) = keys
    index_query = index_query * index_key.shape[-1] ** -0.5
    products = torch.einsum("btic,bnc->btin", index_query, index_key).relu_()
    return torch.einsum("btin,bti->btn", products, weight)


class ChosenDivergence(NamedTuple):
    """The loss over chosen blocks, and what its backward pass needs.

    Attributes:
        loss: [B, T] in nats.
        error: [B, T, K] derivative of the loss by the index scores.
        index: [B, T, K] int32, where the summaries lie among those brought.
    """

    loss: Tensor
    error: Tensor
    index: Tensor


def attention_target(logits: Tensor, seen: Tensor, summary_share: Tensor) -> Tensor:
    """Returns attention's weights on summaries, summed over heads, normed to 1 or all 0.

    Args:
        logits: [B, T, H, N or K]; overwritten, for a copy of all heads would be as large again.
        seen: [B, T, N or K] bool.
        summary_share: [B, T, H] of each head's weight that went to summaries.
    """
    # finite, not minus infinity: a query without a summary would give NaN in the softmax
    lowest = (seen.to(logits.dtype) - 1) * HIDDEN
    weight = logits.add_(lowest[:, :, None]).softmax(-1).flatten(0, 1)
    target = (summary_share.flatten(0, 1)[:, None] @ weight).view(seen.shape).mul_(seen)
    smallest = torch.finfo(logits.dtype).tiny
    return target.div_(target.sum(-1, keepdim=True).clamp_min(smallest)).detach()


def divergence(target: Tensor, index_logits: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (KL(target || softmax of the index logits) [B, T], log of that softmax)."""
    unseen = ~seen
    smallest = torch.finfo(target.dtype).tiny
    lowest = torch.finfo(target.dtype).min
    log_prediction = index_logits.masked_fill(unseen, lowest).log_softmax(-1)
    log_ratio = target.clamp_min(smallest).log() - log_prediction
    loss = torch.where(seen & (target > 0), target * log_ratio, 0).sum(-1)
    return loss, log_prediction


@torch.no_grad()
def divergence_of_chosen(
    main: Tensors,
    summaries: Tensor,
    chosen: Tensors,
    *,
    span: Span,
    summary_span: Span,
    block: int,
) -> ChosenDivergence:
    """Computes the loss over chosen blocks, a chunk of queries at a time.

    Args:
        main: (q [B, T, H, C], share [B, T, H] of weight on summaries).
        summaries: [B, N, C] times the scale of logits.
        chosen: ([B, T, K] numbers of blocks, negative for none; [B, T, K] their index scores).
        span, summary_span: addresses of queries, and of the last tokens of blocks.
        block: tokens in a block.
    """
    query, share = main
    numbers, scores = chosen
    dtype = torch.promote_types(query.dtype, torch.float32)
    lookup = _lookup(numbers, span, summary_span, block)
    step = _queries_at_once(numbers, summaries)
    work = Workspace(query.device)
    loss = torch.empty(query.shape[:2], dtype=dtype, device=query.device)
    error = torch.empty_like(numbers, dtype=dtype)
    found = torch.empty_like(numbers, dtype=torch.int32)
    for start in readings.visited(range(0, query.shape[1], step)):
        part = slice(start, start + step)
        index, seen = lookup(numbers[:, part].int(), part)
        own_summaries = _gathered(work, summaries, index, dtype)
        folded_query = query[:, part].flatten(0, 1).to(dtype)
        logits = work.product("logits", folded_query, own_summaries.transpose(1, 2))
        logits = logits.unflatten(0, seen.shape[:2])
        target = attention_target(logits, seen, share[:, part].to(dtype))
        part_loss, log_prediction = divergence(target, scores[:, part].to(dtype), seen)
        part_error = log_prediction.exp() * target.sum(-1, keepdim=True) - target
        loss[:, part] = part_loss
        error[:, part] = part_error.mul_(seen)
        found[:, part] = index
    return ChosenDivergence(loss, error, found)


class ChosenLoss(torch.autograd.Function):
    """The loss over chosen blocks, differentiable in index queries, their weights and keys."""

    @staticmethod
    def forward(
        ctx: Any, kept: ChosenDivergence, query: Tensor, weight: Tensor, keys: Tensor
    ) -> Tensor:
        """Returns `kept.loss`.

        Args:
            kept: as `divergence_of_chosen` gives it.
            query: [B, T, I, C].
            weight: [B, T, I].
            keys: [B, N, C].
        """
        ctx.kept = kept
        ctx.save_for_backward(query, weight, keys)
        return kept.loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        query, weight, keys = ctx.saved_tensors
        dtype = torch.promote_types(query.dtype, torch.float32)
        d_query = torch.empty_like(query, dtype=dtype)
        d_weight = torch.empty_like(weight, dtype=dtype)
        d_keys = torch.zeros_like(keys, dtype=dtype).flatten(0, 1)
        step = _queries_at_once(ctx.kept.index, keys)
        work = Workspace(keys.device)
        row = torch.arange(len(keys), device=keys.device)[:, None, None] * keys.shape[1]
        for start in readings.visited(range(0, query.shape[1], step)):
            part = slice(start, start + step)
            index = ctx.kept.index[:, part]
            own_keys = _gathered(work, keys, index, dtype)
            own_query = query[:, part].flatten(0, 1).to(dtype) * keys.shape[-1] ** -0.5
            own_weight = weight[:, part].flatten(0, 1).to(dtype)[..., None]
            error = (ctx.kept.error[:, part] * grads[0][:, part, None]).flatten(0, 1)[..., None]
            products = work.product("products", own_query, own_keys.transpose(1, 2)).relu_()
            d_weight[:, part] = (products @ error).view_as(d_weight[:, part])
            # in place: where a product counts, its derivative
            d_products = products.sign_().mul_(own_weight).mul_(error.transpose(1, 2))
            found = d_products @ own_keys
            d_query[:, part] = found.mul_(keys.shape[-1] ** -0.5).view_as(d_query[:, part])
            if keys.shape[1]:
                found = work.product("d_keys", d_products.transpose(1, 2), own_query)
                d_keys.index_add_(0, (index.long() + row).flatten(), found.flatten(0, 1))
        return (
            None,
            d_query.to(query.dtype),
            d_weight.to(weight.dtype),
            d_keys.view_as(keys).to(keys.dtype),
        )


def _queries_at_once(numbers: Tensor, entries: Tensor) -> int:
    """Number of queries in a chunk, each with a copy of its own entries."""
    work = numbers.shape[0] * numbers.shape[-1] * entries.shape[-1]
    return max(1, CHUNK_NUMBERS // max(1, work))


def _gathered(work: Workspace, entries: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Gathers each query's own entries: [B, N, C] at [B, T, K] -> [B T, K, C] of this dtype."""
    if not entries.shape[1]:
        own = take(entries, index.flatten(1).long()).unflatten(1, index.shape[1:])
        return own.flatten(0, 1).to(dtype)
    first = torch.arange(len(entries), device=entries.device, dtype=index.dtype)
    index = index + first[:, None, None] * entries.shape[1]
    return work.gather("entries", entries.flatten(0, 1), index.flatten(0, 1), dtype)


def _lookup(
    numbers: Tensor, span: Span, summary_span: Span, block: int
) -> Callable[[Tensor, slice], tuple[Tensor, Tensor]]:
    """Returns what finds chosen blocks among the summaries of a row: a function of ([B, t, K]
    numbers, the part of the queries that chose them) that gives (index [B, t, K] in the row, seen
    [B, t, K] bool)."""
    tensors = (numbers, span.pos, summary_span.pos)
    if any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        # shapes alone are asked for
        return lambda numbers, part: (torch.zeros_like(numbers), numbers >= 0)
    is_summary = torch.ones_like(summary_span.pos, dtype=torch.bool)
    lookup = BlockLookup(span, summary_span, is_summary, block)
    first = torch.arange(len(numbers), device=numbers.device, dtype=torch.int32)
    first = first[:, None, None] * summary_span.shape[1]

    def find(numbers: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        index, seen = lookup.find(numbers, part)
        return (index - first).clamp_min(0), seen

    return find
