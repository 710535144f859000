"""Runs an attention by the calls that models/kernels/band_plan.py plans.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width; N tokens
of a call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels import reference
from models.kernels.band_plan import BandCall, plan_bands
from models.kernels.flash_attention.capped import CappedKernel
from models.masks.algebra import Mask
from models.scores import Score
from models.span import Span


def merge_into(
    total: reference.Partial, rows: slice | tuple[slice, slice], part: reference.Partial
) -> None:
    """`blockwise.merge_partials` of these rows of `total` with a part, in place."""
    mean = total[0][rows]
    lse = total[1][rows]
    part_mean, part_lse = part
    merged_lse = torch.logaddexp(lse, part_lse)
    mean.lerp_(part_mean, (part_lse - reference.finite_lse(merged_lse)).exp_()[..., None])
    lse.copy_(merged_lse)


def band_calls(
    mask: Mask,
    score: Score,
    kernel: Any,
    operands: Sequence[Tensor] | None,
    span: Span,
    kv_span: Span,
) -> list[BandCall] | None:
    """Returns the calls of a kernel for packed sequences, or None where tiles serve."""
    takes_packed = getattr(kernel, "takes_packed", None)
    if takes_packed is None or operands is None or score.biased:
        return None
    if not takes_packed(*operands):
        return None
    return plan_bands(mask, span, kv_span, takes_only_bands(kernel))


def takes_only_bands(kernel: Any) -> bool:
    """Tells whether a kernel has no other way than packed stretches."""
    return isinstance(kernel, CappedKernel)


def _select_tokens(x: Tensor, tokens: Tensor | slice) -> Tensor:
    """[B, T, ...] -> [N, ...]: these of the tokens of all rows; a view where they are a slice."""
    flat = x.flatten(0, 1)
    return flat[tokens] if isinstance(tokens, slice) else flat.index_select(0, tokens)


def _tokens_of(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B T, ...] in the same memory."""
    return x.view(-1, *x.shape[2:])


def forward_bands(
    kernel: Any,
    calls: Sequence[BandCall],
    operands: Sequence[Tensor],
    scale: float,
    total: reference.Partial,
) -> bool:
    """Attends by these calls: `total` is changed in place.

    Args:
        operands: q [B, T, H, D], k [B, S, G, D], v [B, S, G, E].
        total: mean [B, T, H, E] and lse [B, T, H].

    Returns:
        Whether it did: False where the kernel fails at the first call, before anything is changed.
    """
    q, k, v = operands
    for call in calls:
        keys = _select_tokens(k, call.keys), _select_tokens(v, call.keys)
        part = kernel.forward_packed(_select_tokens(q, call.queries), *keys, scale, call)
        if _failed(part, call, calls):
            return False
        if isinstance(call.queries, slice):
            mean, lse = (_tokens_of(x) for x in total)
            merge_into((mean, lse), call.queries, part)
            continue
        chosen = [_select_tokens(x, call.queries) for x in total]
        merge_into((chosen[0], chosen[1]), slice(None), part)
        for x, merged in zip(total, chosen):
            _tokens_of(x).index_copy_(0, call.queries, merged)
    return True


def _failed(answer: Any, call: BandCall, calls: Sequence[BandCall]) -> bool:
    if answer is None and call is not calls[0]:
        raise RuntimeError("a kernel for packed stretches failed after it had served others")
    return answer is None


def backward_bands(
    kernel: Any,
    calls: Sequence[BandCall],
    operands: Sequence[Tensor],
    sums: Sequence[Tensor],
    scale: float,
    *,
    d_out: Tensor,
    total: reference.Partial,
) -> bool:
    """Adds the gradients of these calls to the wide `sums` of q, k and v.

    Args:
        operands: as in `forward_bands`.
        total: (mean, lse) over ALL keys.

    Returns:
        Whether it did, as `forward_bands`.
    """
    q, k, v = operands
    for call in calls:
        gradients = kernel.backward_packed(
            _select_tokens(q, call.queries),
            _select_tokens(k, call.keys),
            _select_tokens(v, call.keys),
            scale,
            call,
            d_out=_select_tokens(d_out, call.queries),
            mean=_select_tokens(total[0], call.queries),
            lse=_select_tokens(total[1], call.queries),
        )
        if _failed(gradients, call, calls):
            return False
        places = call.queries, call.keys, call.keys
        for accumulator, place, gradient in zip(sums, places, gradients):
            flat = _tokens_of(accumulator)
            if isinstance(place, slice):
                flat[place] += gradient
            else:
                # Keys may be in several stretches of a call.
                flat.index_add_(0, place, gradient.to(flat.dtype))
    return True
