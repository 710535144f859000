"""Contiguous cache: one tensor for each part of the payload, all rows side by side.

Every row reserves the slots of the longest one. Slots are added by blocks; what the mask shows to
no later query gives its slots back first.

Letters: B rows, T tokens at hand, S slots.
"""

import torch
from torch import Tensor

from models.cache.base import KVCache, KVCacheFactory
from models.cache.slots import BLOCK, Placement, SlotTable, write
from models.masks.algebra import Mask
from models.ranges import Piece
from models.scores import Tensors
from models.span import Span


class Contiguous(KVCacheFactory):
    """`cache=contiguous`: everything that may still be read, as it was computed.

    Args:
        block: tokens of a row for which memory is taken at once.
    """

    def __init__(self, block: Piece = BLOCK):
        if block < 1:
            raise ValueError(
                f"cache.block={block} is a number of tokens; use 1 or more, 256 is usual"
            )
        self.block = block

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "ContiguousCache":
        """See KVCacheFactory."""
        slots.block = self.block
        return ContiguousCache(slots)


class ContiguousCache(KVCache):
    """Tensors [B, S, ...] whose slots a table shared with other layers gives out."""

    def __init__(self, slots: SlotTable):
        self.slots = slots
        self.tensors: list[Tensor] = []

    def append(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        placement = self.slots.place(span)
        if self._appended_in_place(payload, placement):
            return
        if not self.tensors:
            for came in payload:
                shape = came.shape[0], placement.capacity, *came.shape[2:]
                self.tensors.append(came.new_zeros(shape))
        for index, came in enumerate(payload):
            held = self.tensors[index]
            if placement.keep is not None:
                held = _gathered(held, placement.keep.to(held.device))
            held = resized(held, placement.capacity)
            write(held, came, placement)
            self.tensors[index] = held

    def _appended_in_place(self, payload: Tensors, placement: Placement) -> bool:
        """Writes a step's tokens where nothing moves and there is room; says whether it did."""
        start = placement.start
        if start is None or placement.keep is not None or not self.tensors:
            return False
        if self.tensors[0].shape[1] != placement.capacity:
            return False
        stop = start + payload[0].shape[1]
        for held, came in zip(self.tensors, payload, strict=True):
            held[:, start:stop] = came
        return True

    def read(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        span = self.slots.read()
        return [held[:, : span.shape[1]] for held in self.tensors], span

    def select(self, rows: Tensor) -> None:
        """See KVCache; the table is told by its owner."""
        self.tensors = [held[rows] for held in self.tensors]

    def join(self, other: "ContiguousCache") -> None:
        """See KVCache; the table is told by its owner, before."""
        joined = []
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            both = [resized(held, self.slots.capacity) for held in (mine, theirs)]
            joined.append(torch.cat(both))
        self.tensors = joined

    def bytes(self) -> int:
        """See KVCache."""
        return sum(held.numel() * held.element_size() for held in self.tensors)

    def export_state(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        return self.read()

    def import_state(self, payload: Tensors, span: Span) -> None:
        """See KVCache; the table is told by its owner, before.

        As wide as it comes: the table may have placed the next tokens already, for another layer.
        """
        self.tensors = [came.clone() for came in payload]


def resized(held: Tensor, capacity: int) -> Tensor:
    """[B, S, ...] -> [B, capacity, ...]: empty slots at the end, or fewer slots."""
    more = capacity - held.shape[1]
    if not more:
        return held
    if more < 0:
        return held[:, :capacity].clone()
    return torch.cat([held, held.new_zeros(held.shape[0], more, *held.shape[2:])], 1)


def _gathered(held: Tensor, keep: Tensor) -> Tensor:
    """[B, S, ...] at slots [B, K] -> [B, K, ...]."""
    index = keep.view(*keep.shape, *[1] * (held.dim() - 2))
    return held.gather(1, index.expand(*keep.shape, *held.shape[2:]))
