"""Inputs of the kernels of a GPU: the choice of one, and tensors that it may load.

Letters: B rows, T tokens, H heads, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.reference import finite_lse

ALIGN = 8  # elements that offsets and strides are multiples of


class KernelChoice(NamedTuple):
    """The kernel of a block by name, its dtype, and its widths of keys and values."""

    kernel: str
    dtype: torch.dtype
    key: int
    value: int


def loadable(x: Tensor, dtype: torch.dtype, width: int, *, gapless: bool = False) -> Tensor:
    """[..., H, D] -> [..., H, width]: filled up with zeros, offset and strides as kernels want."""
    x = x.to(dtype)
    if width > x.shape[-1]:
        x = F.pad(x, (0, width - x.shape[-1]))
    fits = x.stride(-1) == 1 and all(
        step % ALIGN == 0 for step in (x.storage_offset(), *x.stride()[:-1])
    )
    if not fits or (gapless and not x.is_contiguous()):
        x = x.clone(memory_format=torch.contiguous_format)
    return x


def lse_by_head(lse: Tensor, align: int = 1) -> Tensor:
    """[..., T, H] -> [..., H, T filled up] float32: finite, so that what is hidden weighs nothing,
    and infinite where nothing is."""
    lse = finite_lse(lse).float().transpose(-1, -2)
    return F.pad(lse, (0, -lse.shape[-1] % align), value=torch.inf).contiguous()
