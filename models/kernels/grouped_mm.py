"""One matrix product for many experts: rows lie expert by expert, and each stretch meets the matrix
of its expert.

Letters: N rows, K width that comes in, M that goes out, E experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNED_BYTES = 16  # what the grouped kernel asks of the stride of a row


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """[N, M]: the first counts[0] rows times weight[0]^T, the next counts[1] times weight[1]^T, and
    so on.

    Args:
        x: [N, K]. Rows past the sum of `counts` give 0, and get a gradient of 0.
        weight: [E, M, K].
        counts: [E] int64, on the device of x.
    """
    return _select(x, weight)(x, weight, counts)


def _select(x: Tensor, weight: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """A CPU takes a product after the other, a GPU all at once; the meta device wants shapes
    alone."""
    if x.is_meta:
        return lambda x, weight, counts: x @ weight[0].T
    if x.device.type == "cpu":
        return one_by_one
    aligned = all(size * x.element_size() % ALIGNED_BYTES == 0 for size in weight.shape[1:])
    return at_once if hasattr(F, "grouped_mm") and x.dtype == torch.bfloat16 and aligned else padded


def one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """A product for each expert, also for one that nobody visits: its gradient is 0 and not
    None."""
    sizes = counts.tolist()
    rest = len(x) - sum(sizes)
    *parts, tail = x.split([*sizes, rest])
    out = [part @ matrix.T for part, matrix in zip(parts, weight.unbind(0), strict=True)]
    return torch.cat([*out, tail.new_zeros(rest, weight.shape[1])])


def at_once(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """torch's grouped kernel; it leaves rows past the last stretch as memory happens to be, in both
    directions."""
    inside = (torch.arange(len(x), device=x.device) < counts.sum())[:, None]
    ends = counts.cumsum(0).to(torch.int32)
    out = F.grouped_mm(torch.where(inside, x, 0), weight.transpose(1, 2), offs=ends)
    return torch.where(inside, out, 0)


def padded(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Every stretch filled up to the longest, then one batched product: for dtypes and shapes that
    the kernel refuses."""
    ends = counts.cumsum(0)
    row = torch.arange(len(x), device=x.device)
    expert = torch.searchsorted(ends, row, right=True)
    inside = (expert < len(counts))[:, None]
    expert = expert.clamp_max(len(counts) - 1)
    place = torch.where(inside[:, 0], row - (ends - counts)[expert], 0)
    longest = max(1, int(counts.max()))
    slots = torch.where(
        inside[:, 0], expert * longest + place, len(counts) * longest
    )  # the last slot is for nobody
    filled = x.new_zeros(len(counts) * longest + 1, x.shape[1]).index_copy(
        0, slots, torch.where(inside, x, 0)
    )
    out = filled[:-1].unflatten(0, (len(counts), longest)) @ weight.transpose(1, 2)
    return torch.where(inside, out[expert, place], 0)
