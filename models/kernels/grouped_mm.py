"""Grouped matrix product: rows sorted by expert, each stretch times the matrix of its expert.

Letters: N rows, K input width, M output width, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED_BYTES = 16  # the grouped kernel needs row strides of a multiple of it


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Returns [N, M]: the first counts[0] rows times weight[0]^T, the next counts[1] times
    weight[1]^T, and so on.

    Args:
        x: [N, K]. Rows past the sum of `counts` give 0, and get a gradient of 0.
        weight: [E, M, K].
        counts: [E] int64, on the device of x.
    """
    return _select(x, weight)(x, weight, counts)


def _select(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Returns the implementation for this device, dtype and shape."""
    if x.is_meta:
        # The counts have no numbers there, and only shapes are asked for.
        return lambda x, weight, counts: x @ weight[0].T
    if x.device.type == "cpu":
        return one_by_one
    strides = [size * x.element_size() for size in weight.shape[1:]]
    aligned = all(stride % ALIGNED_BYTES == 0 for stride in strides)
    if hasattr(F, "grouped_mm") and x.dtype == torch.bfloat16 and aligned:
        return at_once
    return padded


def one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Computes one product for each expert.

    Also for an expert without rows, so that its gradient is 0 and not None.
    """
    sizes = counts.tolist()
    rest = len(x) - sum(sizes)
    *parts, tail = x.split([*sizes, rest])
    outputs = []
    for part, matrix in zip(parts, weight.unbind(0), strict=True):
        outputs.append(part @ matrix.T)
    return torch.cat([*outputs, tail.new_zeros(rest, weight.shape[1])])


def at_once(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Computes all products by torch's grouped kernel."""
    # The kernel leaves rows past the last stretch uninitialised, in both directions.
    inside = (torch.arange(len(x), device=x.device) < counts.sum())[:, None]
    ends = counts.cumsum(0).to(torch.int32)
    output = F.grouped_mm(torch.where(inside, x, 0), weight.transpose(1, 2), offs=ends)
    return torch.where(inside, output, 0)


def padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Pads every stretch to the longest and computes one batched product.

    For dtypes and shapes that the grouped kernel refuses.
    """
    ends = counts.cumsum(0)
    row = torch.arange(len(x), device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    inside = (expert < len(counts))[:, None]
    expert = expert.clamp_max(len(counts) - 1)
    in_stretch = torch.where(inside[:, 0], row - (ends - counts)[expert], 0)
    longest = max(1, int(counts.max()))
    unused_slot = len(counts) * longest  # the last one; it takes all rows past the stretches
    slots = torch.where(inside[:, 0], expert * longest + in_stretch, unused_slot)
    blank = x.new_zeros(unused_slot + 1, x.shape[1])
    filled = blank.index_copy(0, slots, torch.where(inside, x, 0))
    output = filled[:-1].unflatten(0, (len(counts), longest)) @ weight.transpose(1, 2)
    return torch.where(inside, output[expert, in_stretch], 0)
