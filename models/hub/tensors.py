"""Views by which tensors of a Hugging Face model and of ours become each other without a bit lost.

A `TensorPiece` covers tensors of one side and of the other that hold the same numbers. One of the
two sides has a single tensor, so at most one tensor of either model is whole in memory at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TensorMap = Callable[[Sequence[Tensor]], list[Tensor]]


@dataclass(frozen=True)
class TensorPiece:
    """Tensors that hold the same numbers in both models.

    Attributes:
        ours, theirs: names of the tensors on each side.
        read: theirs -> ours, in the order of the names.
        write: ours -> theirs; the exact inverse.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    read: TensorMap
    write: TensorMap


def same(ours: str, theirs: str) -> TensorPiece:
    """Pairs two tensors that are equal."""
    return TensorPiece((ours,), (theirs,), list, list)


def transposed(ours: str, theirs: str) -> TensorPiece:
    """Pairs two tensors of which one is the other with its last two dims exchanged."""
    return TensorPiece((ours,), (theirs,), _transpose, _transpose)


def stacked(ours: str, theirs: Sequence[str]) -> TensorPiece:
    """Pairs [E, ...] with E tensors [...]."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        # One after the other: a sequence may read a tensor only when it is asked for it.
        first = tensors[0]
        whole = first.new_empty(len(tensors), *first.shape)
        for index, tensor in enumerate(tensors):
            whole[index].copy_(tensor)
        return [whole]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors[0].unbind(0))

    return TensorPiece((ours,), tuple(theirs), read, write)


def split(ours: Sequence[str], theirs: str, dim: int, *, transpose: bool = False) -> TensorPiece:
    """Pairs one tensor with several of equal size that lie behind each other along a dim of it.

    Args:
        dim: of their tensor; counted before its dims are exchanged.
        transpose: exchange the last two dims of each part.
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        length, rest = divmod(tensors[0].shape[dim], len(ours))
        if rest:
            raise ValueError(f"{theirs} does not divide into {len(ours)} parts along dim {dim}")
        parts = list(tensors[0].split(length, dim))
        return _transpose(parts) if transpose else parts

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = _transpose(tensors) if transpose else tensors
        return [torch.cat(list(parts), dim)]

    return TensorPiece(tuple(ours), (theirs,), read, write)


def interleaved(ours: Sequence[str], theirs: str, *, transpose: bool = False) -> TensorPiece:
    """Pairs one tensor with several whose last dims alternate in it, as 0, 1, 0, 1, ...

    Args:
        transpose: exchange the last two dims of each part.
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = [tensors[0][..., offset :: len(ours)] for offset in range(len(ours))]
        return _transpose(parts) if transpose else parts

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = _transpose(tensors) if transpose else tensors
        return [torch.stack(list(parts), -1).flatten(-2)]

    return TensorPiece(tuple(ours), (theirs,), read, write)


def reordered(ours: str, theirs: str, order: Sequence[int]) -> TensorPiece:
    """Pairs two tensors with rows in another order: row i of ours is row order[i] of theirs."""
    inverse = [0] * len(order)
    for row, source in enumerate(order):
        inverse[source] = row

    def pick(rows: Sequence[int]) -> TensorMap:
        return lambda tensors: [tensors[0][list(rows)]]

    return TensorPiece((ours,), (theirs,), pick(order), pick(inverse))


def conv_taps(ours: str, theirs: str) -> TensorPiece:
    """Pairs taps [J, C], newest token first, with the weight [C, 1, J] of a causal nn.Conv1d."""
    return taps_in_one([ours], theirs)


def taps_in_one(
    ours: Sequence[str], theirs: str, channels: Sequence[int] | None = None
) -> TensorPiece:
    """Pairs several taps [J, c], newest token first, with one causal nn.Conv1d over all channels.

    Args:
        channels: c of each; None: all channels are of one.
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        weight = tensors[0].squeeze(1).flip(-1)
        return [part.T for part in weight.split(list(channels or [len(weight)]))]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([taps.T for taps in tensors]).flip(-1).unsqueeze(1)]

    return TensorPiece(tuple(ours), (theirs,), read, write)


def _transpose(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.transpose(-1, -2) for tensor in tensors]
