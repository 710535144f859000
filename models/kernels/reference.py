"""Reference kernel: one block of any score, any mask, any dtype.

Every other kernel is tested against it. The backward pass computes the logits of the block again,
under autograd, so that a score's use of its queries, keys and parameters is differentiated by the
same code that computed it.

Letters: B rows, T queries, S keys, H heads, E value width.
"""

import torch
from torch import Tensor

from models.masks.algebra import Mask, visible
from models.scores import Score, Tensors
from models.span import Span

TILE_SIDE = 512  # tokens on the side of the largest tile: it holds B x H x SIDE x SIDE scores

# (mean [B, T, H, E], lse [B, T, H] in nats, minus infinity where no key was seen)
Partial = tuple[Tensor, Tensor]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of sums: float32, or float64 where the inputs are."""
    return torch.promote_types(dtype, torch.float32)


def finite_lse(lse: Tensor) -> Tensor:
    """Replaces minus infinity by 0, so that exp(-inf - lse) is 0 and not NaN."""
    return torch.where(lse == -torch.inf, torch.zeros_like(lse), lse)


def _scores(
    score: Score,
    mask: Mask | None,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    heads: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns masked logits [B, H, T, S] and values [B, S, H, E], both wide."""
    dtype = accumulation_dtype(query[0].dtype)
    query = [tensor.to(dtype) for tensor in query]
    payload = [tensor.to(dtype) for tensor in payload]
    params = [tensor.to(dtype) for tensor in params]
    logits = score.logits(query, payload, params, span, kv_span, heads)
    if mask is not None:
        logits = logits.masked_fill(~visible(mask, span, kv_span, heads), -torch.inf)
    _, _, value = score.operands(query, payload, params)
    return logits, value.repeat_interleave(logits.shape[1] // value.shape[2], 2)


def forward(
    score: Score,
    mask: Mask | None,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    heads: Tensor,
) -> Partial:
    """Attends to the keys of one block; mask None: every query sees all of them."""
    logits, value = _scores(score, mask, query, payload, params, span, kv_span, heads)
    lse = logits.logsumexp(-1)
    weight = (logits - finite_lse(lse)[..., None]).exp()
    return torch.einsum("bhts,bshe->bthe", weight, value), lse.transpose(1, 2)


def backward(
    score: Score,
    mask: Mask | None,
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
    """Returns the gradients of (*query, *payload, *params) through one block.

    Args:
        d_out: [B, T, H, E] gradient of the mean over ALL keys, of this block and of every other.
        lse: [B, T, H] lse of all keys.
        delta: [B, T, H] sum over E of d_out * mean, less the gradient of the lse where that is
            used.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in (*query, *payload, *params)]
    queries = len(query)
    payloads = len(query) + len(payload)
    with torch.enable_grad():
        logits, value = _scores(
            score,
            mask,
            leaves[:queries],
            leaves[queries:payloads],
            leaves[payloads:],
            span,
            kv_span,
            heads,
        )
    # With the lse of all keys, these are the weights of the whole row, not of the block alone.
    weight = (logits.detach() - finite_lse(lse).transpose(1, 2)[..., None]).exp()
    d_weight = torch.einsum("bthe,bshe->bhts", d_out, value.detach())
    d_logits = weight * (d_weight - delta.transpose(1, 2)[..., None])
    d_value = torch.einsum("bhts,bthe->bshe", weight, d_out)
    gradients = torch.autograd.grad([logits, value], leaves, [d_logits, d_value], allow_unused=True)
    return list(gradients)
