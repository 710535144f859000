"""Blockwise attention: runs the blocks of a plan, forward and backward.

Forward merges every block into one (mean, lse), backward adds to the gradients. A ring calls these
once for every rank whose keys arrive, with the same accumulators; one device calls them once.

Letters: B rows, T queries, S keys, H heads, E value width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.kernels import nonfinite, reference
from models.kernels.backends import select_capped, select_kernel
from models.kernels.block_plan import (
    CAUSAL_TILE,
    FULL_TILE,
    LEAF,
    PARTIAL_TILE,
    Tile,
    plan_rows,
    split_tile,
)
from models.kernels.operands import Operands, add_gradients
from models.kernels.packed import (
    backward_bands,
    band_calls,
    forward_bands,
    merge_into,
    takes_only_bands,
)
from models.kernels.pairs import chosen_pairs
from models.kernels.triton_attention import dispatch as pairwise
from models.masks.algebra import Mask, visible
from models.scores import Score, Tensors
from models.span import Span


@dataclass(frozen=True)
class AttentionSpec:
    """A score under a mask, for these (global) heads.

    Attributes:
        general: whether the reference kernel is required.
    """

    score: Score
    mask: Mask
    heads: Tensor
    general: bool = False


def merge_partials(a: reference.Partial, b: reference.Partial) -> reference.Partial:
    """Joins two partial attentions over disjoint keys into one over their union.

    Args:
        a, b: mean [B, T, H, E] and lse [B, T, H] in nats; minus infinity where no key was seen.

    Returns:
        The same pair for the union; associative and commutative up to rounding. Two empty partials
        give an empty one, never NaN.

    Source: Milakov & Gimelshein 2018 (arXiv:1805.02867). Ours keeps the log of the sum, theirs the
    maximum and the sum.
    """
    mean_a, lse_a = a
    mean_b, lse_b = b
    lse = torch.logaddexp(lse_a, lse_b)
    share_b = (lse_b - reference.finite_lse(lse)).exp()
    return torch.lerp(mean_a, mean_b, share_b[..., None]), lse


def empty_partial(query: Tensors, heads: int, width: int) -> reference.Partial:
    """Returns the attention over no keys: mean 0 [B, T, H, E], lse minus infinity [B, T, H]."""
    shape = (*query[0].shape[:2], heads)
    dtype = reference.accumulation_dtype(query[0].dtype)
    mean = query[0].new_zeros(*shape, width, dtype=dtype)
    return mean, query[0].new_full(shape, -torch.inf, dtype=dtype)


def _query_slices(block: Tile) -> tuple[slice, slice]:
    return slice(block.r0, block.r1), slice(block.q0, block.q1)


def _key_slices(block: Tile) -> tuple[slice, slice]:
    return slice(block.r0, block.r1), slice(block.k0, block.k1)


def _visibility(
    spec: AttentionSpec, block: Tile, span: Span, kv_span: Span, dtype: torch.dtype
) -> tuple[bool, Tensor | None]:
    """Returns (the kernel's own causal flag, a matrix to add to the scores or None).

    The matrix is wide where it carries numbers; where it only hides keys it has the dtype of the
    queries, which is exact.
    """
    queries = _query_slices(block)
    keys = _key_slices(block)
    q_span = span.map(lambda addresses: addresses[queries])
    k_span = kv_span.map(lambda addresses: addresses[keys])
    bias = spec.score.bias(q_span, k_span, spec.heads, reference.accumulation_dtype(dtype))
    if block.kind != PARTIAL_TILE and bias is None:
        return block.kind == CAUSAL_TILE, None
    seen = visible(spec.mask, q_span, k_span, spec.heads)
    if bias is None:
        bias = torch.zeros((), dtype=dtype, device=seen.device)
    return False, torch.where(seen, bias, -torch.inf)


def _block_mask(spec: AttentionSpec, block: Tile) -> Mask | None:
    """Returns the mask for the reference kernel: None where every query sees every key."""
    return None if block.kind == FULL_TILE else spec.mask


def _in_tile(
    spec: AttentionSpec,
    block: Tile,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
) -> tuple[Any, ...]:
    """Returns the arguments that the reference kernel takes for a block."""
    rows = _query_slices(block)
    keys = _key_slices(block)
    return (
        spec.score,
        _block_mask(spec, block),
        [tensor[rows] for tensor in query],
        [tensor[keys] for tensor in payload],
        params,
        span.map(lambda addresses: addresses[rows]),
        kv_span.map(lambda addresses: addresses[keys]),
        spec.heads,
    )


def _tile_side(spec: AttentionSpec) -> int | None:
    """Returns the largest side of a block; None where blocks need only the kernel's own flags."""
    return LEAF if spec.score.biased else None


def _kernel_blocks(
    spec: AttentionSpec, span: Span, kv_span: Span, kernel: Any, tensors: Sequence[Tensor]
) -> Iterator[tuple[Any, Tile]]:
    """Yields (the module that computes it, block) for all blocks of the plan.

    On a CPU blocks that hide keys go to `nonfinite` if any number is not finite: a kernel hides a
    key by weight 0, and 0 x NaN is NaN.
    """
    blocks = plan_rows(spec.mask, span, kv_span)
    hides_keys = any(block.kind != FULL_TILE for block in blocks)
    # On a GPU the look would wait for the device, once for every block.
    looks = hides_keys and tensors[0].is_cpu
    doubtful = looks and not nonfinite.all_finite(tensors)
    side = reference.TILE_SIDE if kernel is None else _tile_side(spec)
    for block in blocks:
        if doubtful and block.kind != FULL_TILE:
            for part in split_tile(block, reference.TILE_SIDE):
                yield nonfinite, part
        elif side is None:
            yield kernel, block
        else:
            for part in split_tile(block, side):
                yield kernel or reference, part


def _select(spec: AttentionSpec, query: Tensors) -> Any:
    """Returns the fast kernel for this attention, or None for the reference kernel."""
    if spec.general:
        return None
    about = query[0].device, query[0].dtype, spec.score
    return select_kernel(*about) or select_capped(*about)


def forward(
    spec: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    total: reference.Partial,
) -> None:
    """Attends to these keys too: `total` is changed in place."""
    blocks = chosen_pairs.chosen_blocks(spec, query, payload, span, kv_span)
    if blocks is not None:
        operands = spec.score.operands(query, payload, params)
        chosen_pairs.forward(blocks, operands, spec.score.scale(query[0]), total)
        return
    kernel = _select(spec, query)
    operands = spec.score.operands(query, payload, params) if kernel else None
    calls = band_calls(spec.mask, spec.score, kernel, operands, span, kv_span)
    if (
        calls is not None
        and operands is not None
        and forward_bands(kernel, calls, operands, spec.score.scale(operands[0]), total)
    ):
        return
    if takes_only_bands(kernel):
        kernel = operands = None
    work = pairwise.pairwise_attention(spec, query, payload, params, span, kv_span)
    if work and pairwise.forward(work, spec.score, query, payload, total):
        return
    for module, block in _kernel_blocks(spec, span, kv_span, kernel, (*query, *payload)):
        rows = _query_slices(block)
        keys = _key_slices(block)
        if kernel and operands and module is kernel:
            q = operands[0][rows]
            k = operands[1][keys]
            v = operands[2][keys]
            causal, bias = _visibility(spec, block, span, kv_span, q.dtype)
            part = kernel.forward(q, k, v, spec.score.scale(q), causal, bias)
        else:
            part = module.forward(*_in_tile(spec, block, query, payload, params, span, kv_span))
        merge_into(total, rows, part)


@dataclass
class Gradients:
    """Wide sums of the gradients of (*query, *payload, *params)."""

    query: list[Tensor]
    payload: list[Tensor]
    params: list[Tensor]

    def of(self, rows: tuple[slice, slice], keys: tuple[slice, slice]) -> list[Tensor]:
        """Returns the sums of these queries and keys."""
        return [*(sums[rows] for sums in self.query), *(sums[keys] for sums in self.payload)]

    def all(self) -> list[Tensor]:
        """Returns the sums of all tensors, those of queries first and of params last."""
        return [*self.query, *self.payload, *self.params]

    @staticmethod
    def zeros(query: Tensors, payload: Tensors, params: Tensors) -> "Gradients":
        """Returns sums of 0 for these tensors."""
        return Gradients(_wide_zeros(query), _wide_zeros(payload), _wide_zeros(params))

    def with_keys(self, payload: Tensors) -> "Gradients":
        """Returns sums that share those of queries and params, and begin at 0 for these keys."""
        return Gradients(self.query, _wide_zeros(payload), self.params)


def _wide_zeros(tensors: Tensors) -> list[Tensor]:
    zeros = []
    for tensor in tensors:
        dtype = reference.accumulation_dtype(tensor.dtype)
        # Without the memory format, zeros would copy the strides of a transposed tensor.
        zeros.append(torch.zeros_like(tensor, dtype=dtype, memory_format=torch.contiguous_format))
    return zeros


def backward(
    spec: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    *,
    d_out: Tensor,
    total: reference.Partial,
    delta: Tensor,
    into: Gradients,
) -> None:
    """Adds the contribution of these keys to every gradient.

    Args:
        total: (mean, lse) over ALL keys.
        delta: see reference.backward.
    """
    lse = total[1]
    blocks = chosen_pairs.chosen_blocks(spec, query, payload, span, kv_span, (d_out, delta))
    if blocks is not None:
        operands = Operands(spec.score, query, payload, params, into.all())
        chosen_pairs.backward(blocks, operands, spec.score.scale(query[0]), d_out, lse, delta)
        operands.close()
        return
    if _backward_in_bands(spec, query, payload, params, span, kv_span, d_out, total, into):
        return
    work = pairwise.pairwise_attention(spec, query, payload, params, span, kv_span)
    sums = into.query, into.payload, into.params
    if work and pairwise.backward(
        work, spec.score, query, payload, d_out=d_out, lse=lse, delta=delta, into=sums
    ):
        return
    _backward_by_tiles(
        spec,
        query,
        payload,
        params,
        span,
        kv_span,
        d_out=d_out,
        total=total,
        delta=delta,
        into=into,
    )


def _backward_in_bands(
    spec: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    d_out: Tensor,
    total: reference.Partial,
    into: Gradients,
) -> bool:
    """`backward` by calls that take the bands of a mask together; False where there are none."""
    kernel = _select(spec, query)
    if not hasattr(kernel, "takes_packed"):
        return False
    operands = Operands(spec.score, query, payload, params, into.all())
    calls = band_calls(spec.mask, spec.score, kernel, operands.operands, span, kv_span)
    if calls is None:
        return False
    scale = spec.score.scale(operands.operands[0])
    tensors = operands.operands, operands.sums
    if not backward_bands(kernel, calls, *tensors, scale, d_out=d_out, total=total):
        return False
    operands.close()
    return True


def _backward_by_tiles(
    spec: AttentionSpec,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    span: Span,
    kv_span: Span,
    *,
    d_out: Tensor,
    total: reference.Partial,
    delta: Tensor,
    into: Gradients,
) -> None:
    """`backward` of the tiles of the mask."""
    mean, lse = total
    kernel = _select(spec, query)
    if takes_only_bands(kernel):
        kernel = None
    operands = Operands(spec.score, query, payload, params, into.all()) if kernel else None
    finite = (*query, *payload, d_out, delta)
    for module, block in _kernel_blocks(spec, span, kv_span, kernel, finite):
        rows = _query_slices(block)
        keys = _key_slices(block)
        if kernel and operands and module is kernel:
            (q, k, v), sums = operands.of(rows, keys)
            causal, bias = _visibility(spec, block, span, kv_span, q.dtype)
            gradients = kernel.backward(
                q,
                k,
                v,
                spec.score.scale(q),
                causal,
                bias,
                d_out=d_out[rows],
                mean=mean[rows],
                lse=lse[rows],
            )
        else:
            gradients = module.backward(
                *_in_tile(spec, block, query, payload, params, span, kv_span),
                d_out=d_out[rows],
                lse=lse[rows],
                delta=delta[rows],
            )
            sums = [*into.of(rows, keys), *into.params]
        add_gradients(sums, gradients)
    if operands:
        operands.close()
