"""PyTorch's flash kernel for CPUs, made safe; for scores without parameters.

Four edges of `aten::_scaled_dot_product_flash_attention_for_cpu` are guarded here, each held by a
test: an empty side kills the process (no such block is ever planned, and it is refused); a last dim
that is not contiguous gives wrong numbers (made contiguous); a query that sees no key answers lse 0
(set to minus infinity); key and value widths must be equal (the narrower is padded with zeros).
bfloat16 and float16 are computed in float32, which is faster here and exact.

Letters: b rows, t queries, s keys, H query heads, G key heads, D key width, E value width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.reference import Partial, accumulation_dtype, finite_lse

WIDE = torch.float32, torch.float64

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _kernel_layout(x: Tensor, width: int) -> Tensor:
    """[b, t, H, D] -> [b, H, t, width] for the kernel: wide, padded, contiguous in its last dim."""
    if x.dtype not in WIDE:
        x = x.to(accumulation_dtype(x.dtype))
    if width > x.shape[-1]:  # padding by nothing would copy
        x = F.pad(x, (0, width - x.shape[-1]))
    if x.stride(-1) != 1:
        x = x.contiguous()
    return x.transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, triangle: bool, add: Tensor | None
) -> Partial:
    """Attends q [b, t, H, D] to k [b, s, G, D], v [b, s, G, E].

    Args:
        triangle: whether query i sees keys 0..i alone.
        add: [b or 1, H or 1, t, s], added to the scores; minus infinity at unseen keys.
    """
    if not (q.shape[1] and k.shape[1]):
        raise ValueError(f"a block has queries and keys, got {q.shape[1]} and {k.shape[1]}")
    width = max(q.shape[-1], v.shape[-1])
    if add is not None:
        add = add.to(accumulation_dtype(q.dtype))
    operands = [_kernel_layout(x, width) for x in (q, k, v)]
    mean, lse = _forward(*operands, 0.0, triangle, attn_mask=add, scale=scale)
    mean = mean[..., : v.shape[-1]].transpose(1, 2)
    lse = lse.transpose(1, 2)
    if add is not None:
        blind = (add == -torch.inf).all(-1).transpose(1, 2).expand(lse.shape)
        lse = lse.masked_fill(blind, -torch.inf)
        mean = mean.masked_fill(blind[..., None], 0)
    return mean, lse


def takes_one(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Tells whether `forward_one` takes them: widths, types and memory are as the kernel has it."""
    if not q.is_cpu or q.dtype not in WIDE or q.shape[-1] != v.shape[-1]:
        return False
    return q.shape[1] == 1 and k.stride(-1) == 1 and v.stride(-1) == 1


def forward_one(q: Tensor, k: Tensor, v: Tensor, scale: float, add: Tensor | None) -> Partial:
    """Attends one query of each row, q [b, 1, H, D], to k [b, s, G, D], v [b, s, G, D].

    For what `takes_one` says, and queries that each see a key. The query heads that share a key
    head go in as queries of one head: the kernel would read the keys once for each.

    Args:
        add: as in `forward`, with H = 1.
    """
    rows, _, heads, width = q.shape
    grouped = q.reshape(rows, k.shape[2], -1, width)
    keys = k.transpose(1, 2)
    values = v.transpose(1, 2)
    mean, lse = _forward(grouped, keys, values, 0.0, False, attn_mask=add, scale=scale)
    return mean.reshape(rows, 1, heads, width), lse.reshape(rows, 1, heads)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    triangle: bool,
    add: Tensor | None,
    *,
    d_out: Tensor,
    mean: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the wide gradients of q, k and v through one block.

    Args:
        d_out: gradient of the mean.
        mean, lse: those over ALL keys.
    """
    width = max(q.shape[-1], v.shape[-1])
    if add is not None:
        add = add.to(accumulation_dtype(q.dtype))
    operands = [_kernel_layout(x, width) for x in (d_out, q, k, v, mean)]
    # The kernel's weights are exp(score - lse): where no key was seen, minus infinity gives NaN.
    kernel_lse = finite_lse(lse).transpose(1, 2)
    d_q, d_k, d_v = _backward(*operands, kernel_lse, 0.0, triangle, attn_mask=add, scale=scale)
    return (
        d_q.transpose(1, 2)[..., : q.shape[-1]],
        d_k.transpose(1, 2)[..., : k.shape[-1]],
        d_v.transpose(1, 2)[..., : v.shape[-1]],
    )
