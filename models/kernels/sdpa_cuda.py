"""Blocks on an NVIDIA GPU, by the two PyTorch kernels whose backward takes the lse over ALL keys.

`flash` (Dao 2023, arXiv:2307.08691) takes half precision without a matrix to add; `efficient` (Rabe
& Staats 2021, arXiv:2112.05682, as built in xFormers) takes float32, and blocks with one. Guarded
here, each held by a test: key and value widths are filled up with zeros to what a kernel takes
(flash: equal, multiples of 8); pointers and strides are multiples of 8 elements; the added matrix
has rows of a multiple of 16; `efficient` wants as many key heads as query heads, and lse in rows
of a multiple of 32, filled up with plus infinity; a query that sees no key answers lse minus
infinity, mean 0.

Half precision stays half inside a block and is summed wide over blocks. A matrix in half precision
only hides keys and is exact; one that is wide carries numbers, and its block is computed in
float32. float64 and ROCm use the reference kernel.
Left out: FlexAttention takes no lse from outside, so it cannot serve in a ring; PyTorch's cuDNN
kernel does not promise what its statistics hold; the packages flash-attn 2 and 3 change signatures
between releases and were not at hand to check. The order of sums of the backward passes is only
fixed under `torch.use_deterministic_algorithms(True)`.

Letters: b rows, t queries, s keys, H query heads, G key heads, D key width, E value width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.reference import Partial, accumulation_dtype, finite_lse

# elements
ALIGN = 8
BIAS_ALIGN = 16
MASS_ALIGN = 32
WIDEST = 256  # head width of flash
HALF = torch.float16, torch.bfloat16

flash = torch.ops.aten._scaled_dot_product_flash_attention.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default
efficient_backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default


class KernelChoice(NamedTuple):
    """The kernel of a block: flash or not, its dtype, and its widths of keys and values."""

    flash: bool
    dtype: torch.dtype
    key: int
    value: int


def capability(device: torch.device) -> tuple[int, int]:
    """Generation of the GPU; (0, 0) where this build of PyTorch lacks flash, and Hopper for tensors
    without numbers."""
    if device.type != "cuda":
        return 9, 0
    if not torch.backends.cuda.is_flash_attention_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def choose_kernel(
    dtypes: list[torch.dtype], key: int, value: int, generation: tuple[int, int]
) -> KernelChoice:
    """Choose by what is to be computed; `dtypes` are those of q, k, v and of the added matrix if
    there is one."""
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    key, value = (-(-width // ALIGN) * ALIGN for width in (key, value))
    widest = max(key, value)
    # These generations have too little shared memory for some widths.
    small = generation[0] == 12 or (generation[0] == 8 and generation[1] > 0)
    able = generation >= (8, 0) and widest <= WIDEST and not (small and 192 < widest <= 224)
    if dtype in HALF and len(dtypes) == 3 and able:
        return KernelChoice(True, dtype, widest, widest)
    if dtype == torch.bfloat16 and generation < (8, 0):
        dtype = torch.float32
    return KernelChoice(False, dtype, key, value)


def _way(q: Tensor, k: Tensor, v: Tensor, add: Tensor | None) -> KernelChoice:
    dtypes = [x.dtype for x in (q, k, v, add) if x is not None]
    return choose_kernel(dtypes, q.shape[-1], v.shape[-1], capability(q.device))


def _ready(x: Tensor, dtype: torch.dtype, width: int, *, packed: bool = False) -> Tensor:
    """[b, t, H, D] -> [b, H, t, width]: filled up, and laid out so that a kernel may load it;
    `packed` allows no gaps."""
    x = x.to(dtype)
    if width > x.shape[-1]:
        x = F.pad(x, (0, width - x.shape[-1]))
    fits = x.stride(-1) == 1 and all(
        step % ALIGN == 0 for step in (x.storage_offset(), *x.stride()[:-1])
    )
    if not fits or (packed and not x.is_contiguous()):
        x = x.clone(memory_format=torch.contiguous_format)
    return x.transpose(1, 2)


def _spread(x: Tensor, heads: int) -> Tensor:
    """[b, s, G, D] -> [b, s, heads, D]: every query head its own copy of the key head that it
    reads."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], 2)


def _gather(grad: Tensor, like: Tensor) -> Tensor:
    """The adjoint of `_ready(_spread(like))`, wide: [b, heads, s, width] -> [b, s, G, D]."""
    grad = grad.transpose(1, 2)[..., : like.shape[-1]].to(accumulation_dtype(like.dtype))
    groups = like.shape[2]
    if grad.shape[2] == groups:
        return grad
    return grad.unflatten(2, (groups, grad.shape[2] // groups)).sum(3)


def _bias(add: Tensor | None, dtype: torch.dtype, rows: int, heads: int) -> Tensor | None:
    """[b or 1, H or 1, t, s] -> [b, H, t, s], with rows that begin where a kernel may load them."""
    if add is None:
        return None
    size = add.shape[-1]
    room = add.new_zeros(*add.shape[:-1], size + -size % BIAS_ALIGN, dtype=dtype)
    room[..., :size] = add
    return room[..., :size].expand(rows, heads, *add.shape[2:])


def _masses(lse: Tensor, align: int) -> Tensor:
    """[b, t, H] -> [b, H, t filled up]: finite, so that what is hidden weighs nothing, and infinite
    where nothing is."""
    lse = finite_lse(lse).float().transpose(1, 2)
    return F.pad(lse, (0, -lse.shape[-1] % align), value=torch.inf).contiguous()


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, triangle: bool, add: Tensor | None
) -> Partial:
    """Attends q [b, t, H, D] to k [b, s, G, D], v [b, s, G, E]; `add` [b or 1, H or 1, t, s] holds
    -inf at unseen keys."""
    if not (q.shape[1] and k.shape[1]):
        raise ValueError(f"a block has queries and keys, got {q.shape[1]} and {k.shape[1]}")
    use = _way(q, k, v, add)
    rows = q.shape[0]
    heads = q.shape[2]
    query = _ready(q, use.dtype, use.key)
    if use.flash:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        mean, lse = flash(query, *both, 0.0, triangle, False, scale=scale)[:2]
    else:
        both = (
            _ready(_spread(k, heads), use.dtype, use.key),
            _ready(_spread(v, heads), use.dtype, use.value),
        )
        bias = _bias(add, use.dtype, rows, heads)
        mean, lse = efficient(query, *both, bias, True, 0.0, triangle, scale=scale)[:2]
    mean = mean.transpose(1, 2)[..., : v.shape[-1]].to(accumulation_dtype(q.dtype))
    lse = lse[..., : q.shape[1]].transpose(1, 2).to(mean.dtype)
    if add is not None:
        blind = (add == -torch.inf).all(-1).transpose(1, 2).expand(lse.shape)
        lse = lse.masked_fill(blind, -torch.inf)
        mean = mean.masked_fill(blind[..., None], 0)
    return mean, lse


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
    """Returns the wide gradients of q, k, v through a block, given mean and lse over ALL keys."""
    use = _way(q, k, v, add)
    rows = q.shape[0]
    heads = q.shape[2]
    inner_d_out, out = (_ready(x, use.dtype, use.value, packed=True) for x in (d_out, mean))
    query = _ready(q, use.dtype, use.key)
    if use.flash:
        both = _ready(k, use.dtype, use.key), _ready(v, use.dtype, use.value)
        sizes = (None, None, q.shape[1], k.shape[1])
        # The generator's state of a dropout that is 0.
        dropout = (
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            torch.empty(0, device=q.device),
        )
        tensors = (inner_d_out, query, *both, out, _masses(lse, 1))
        grads = flash_backward(*tensors, *sizes, 0.0, triangle, *dropout, scale=scale)
    else:
        both = (
            _ready(_spread(k, heads), use.dtype, use.key),
            _ready(_spread(v, heads), use.dtype, use.value),
        )
        bias = _bias(add, use.dtype, rows, heads)
        inner_lse = _masses(lse, MASS_ALIGN)
        none = torch.zeros((), dtype=torch.int64, device=q.device)  # of dropout
        wanted = [True, True, True, False]
        grads = efficient_backward(
            inner_d_out,
            query,
            *both,
            bias,
            out,
            inner_lse,
            none,
            none,
            0.0,
            wanted,
            triangle,
            scale=scale,
        )[:3]
    return _gather(grads[0], q), _gather(grads[1], k), _gather(grads[2], v)
