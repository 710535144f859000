"""Calls the Triton kernels for all rows, heads and blocks of an attention at once.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width, N
distances.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels.reference import Partial
from models.kernels.triton_attention.arguments import Addresses, Bias, How, Lists, StridedTensor
from models.kernels.triton_attention.backward import key_gradient_kernel, query_gradient_kernel
from models.kernels.triton_attention.block_lists import Ranges, block_lists
from models.kernels.triton_attention.forward import forward_kernel
from models.kernels.triton_attention.programs import token_table
from models.kernels.triton_attention.sizes import (
    FORWARD,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    BlockConfig,
    filled_up,
    size_of,
)
from models.kernels.triton_attention.terms import DISTANCES, bias_numbers, is_heavy

# Of float32 numbers: three products of TF32, which lose little.
PRECISION = "tf32x3"


def forward(work: Any, operands: Sequence[Tensor], scale: float, total: Partial) -> None:
    """Attends to these keys too: `total` is changed in place.

    Args:
        work: a dispatch.PairwiseAttention.
        operands: q [B, T, H, D], k [B, S, G, D], v [B, S, G, E].
        scale: of the products.
        total: mean [B, T, H, E] and lse [B, T, H], float32.
    """
    q, k, v = (_last_dense(x) for x in operands)
    size = _size(FORWARD, work, q, v)
    lists = block_lists(work.mask, work.span, work.kv_span, (size.side_q, size.side_k)).of_queries
    kernel: Any = forward_kernel
    kernel[_grid(lists, q)](
        _rows(q),
        _rows(k),
        _rows(v),
        *map(_rows, total),
        *_shared(work, scale, q, k, lists),
        HOW=_how(work, q, v, size),
        num_warps=size.warps,
        num_stages=size.stages,
    )


def backward(
    work: Any,
    operands: Sequence[Tensor],
    sums: Sequence[Tensor],
    scale: float,
    *,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
) -> Tensor | None:
    """Adds to the gradients of q, k and v.

    Args:
        work, operands: as in `forward`.
        sums: float32, of the shapes of the operands.
        d_out: [B, T, H, E] gradient of the mean over ALL keys.
        lse, delta: [B, T, H] float32, as in reference.backward.

    Returns:
        The gradient of the numbers of a learned bias by distances [H, N] float32, or None.
    """
    q, k, v = (_last_dense(x) for x in operands)
    d_out = _last_dense(d_out.to(q.dtype))
    tensors = [_rows(x) for x in (q, k, v, d_out, lse, delta)]
    size = _size(QUERY_GRADIENT, work, q, v)
    lists = block_lists(work.mask, work.span, work.kv_span, (size.side_q, size.side_k)).of_queries
    shared = _shared(work, scale, q, k, lists)
    d_numbers = torch.zeros_like(shared[2].numbers)
    kernel: Any = query_gradient_kernel
    kernel[_grid(lists, q)](
        *tensors,
        _rows(sums[0]),
        d_numbers,
        *shared,
        HOW=_how(work, q, v, size),
        num_warps=size.warps,
        num_stages=size.stages,
    )
    size = _size(KEY_GRADIENT, work, q, v)
    lists = block_lists(work.mask, work.span, work.kv_span, (size.side_q, size.side_k)).of_keys
    kernel = key_gradient_kernel
    kernel[_grid(lists, k)](
        *tensors,
        _rows(sums[1]),
        _rows(sums[2]),
        *_shared(work, scale, q, k, lists),
        HOW=_how(work, q, v, size),
        num_warps=size.warps,
        num_stages=size.stages,
    )
    return d_numbers if work.terms.bias == DISTANCES else None


def _grid(lists: Ranges, heads_of: Tensor) -> tuple[int, int, int]:
    rows, blocks, _ = lists.index.shape
    return blocks, heads_of.shape[2], rows


def _last_dense(x: Tensor) -> Tensor:
    """The numbers of a head of a token follow each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> StridedTensor:
    row, token, head = x.stride()[:3]
    return StridedTensor(x, row, token, head)


def _size(kernel: str, work: Any, q: Tensor, v: Tensor) -> BlockConfig:
    width = max(filled_up(q.shape[-1]), filled_up(v.shape[-1]))
    return size_of(kernel, q.dtype, width, heavy=is_heavy(work.terms.bias, work.terms.cap > 0))


def _how(work: Any, q: Tensor, v: Tensor, size: BlockConfig) -> How:
    return How(
        work.program.code,
        work.terms.bias,
        work.terms.cap > 0,
        PRECISION,
        q.shape[-1],
        v.shape[-1],
        filled_up(q.shape[-1]),
        filled_up(v.shape[-1]),
        size.side_q,
        size.side_k,
    )


def _shared(work: Any, scale: float, q: Tensor, k: Tensor, lists: Ranges) -> tuple[Any, ...]:
    """The arguments that all kernels end with."""
    queries = token_table(work.program, work.span, keys=False)
    keys = token_table(work.program, work.kv_span, keys=True)
    numbers = bias_numbers(work.terms, work.params, work.heads)
    count = numbers.values.shape[-1]
    bias = Bias(work.heads.int(), numbers.values, numbers.nearest, count, scale, work.terms.cap)
    return (
        Addresses(queries, queries.shape[1], queries.shape[2]),
        Addresses(keys, keys.shape[1], keys.shape[2]),
        bias,
        Lists(*lists),
        q.shape[2] // k.shape[2],
    )
