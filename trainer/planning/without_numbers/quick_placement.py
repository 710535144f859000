"""Places parameters that have no numbers without work that only numbers need.

FSDP2 cuts each parameter into as many views as there are ranks and keeps one of them; a view takes
a tenth of a millisecond: at 1,024 ranks, all of the time of a plan. A digest of the initial weights
weighs each by its place, and places are real: of 8 billion weights, minutes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param

from parallel.engines import materialize

CUT = "_chunk_with_empty"  # (tensor, number, dim) -> as many views, empty ones at the end


class LazyChunks(Sequence[Tensor]):
    """The parts of a tensor along `dim`, as torch.chunk cuts, each made when it is asked for."""

    def __init__(self, tensor: Tensor, count: int, dim: int):
        self.tensor = tensor
        self.ranks = count
        self.dim = dim
        self.size = -(-tensor.shape[dim] // count)

    def __len__(self) -> int:
        return self.ranks

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[part] for part in range(*index.indices(self.ranks))]
        if not 0 <= index < self.ranks:
            raise IndexError(index)
        start = index * self.size
        length = min(self.size, self.tensor.shape[self.dim] - start)
        if length <= 0:
            return self.tensor.new_empty(0)
        return self.tensor.narrow(self.dim, start, length)


@contextmanager
def placed_without_numbers() -> Iterator[None]:
    """Has FSDP2 cut parameters lazily, and takes no digest of weights."""
    every = getattr(_fsdp_param, CUT)
    checksum = materialize.checksum
    setattr(_fsdp_param, CUT, LazyChunks)
    materialize.checksum = _no_checksum
    try:
        yield
    finally:
        setattr(_fsdp_param, CUT, every)
        materialize.checksum = checksum


def _no_checksum(tensor: Tensor) -> str:
    return ""
