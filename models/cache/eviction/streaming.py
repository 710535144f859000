"""StreamingLLM: the first tokens of a text and its newest ones.

Letters: B rows, S slots.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.cache.eviction.base import EvictingCache, Eviction
from models.cache.slots import SlotTable
from models.cache.turning import Turn, cannot_turn, turns
from models.masks.algebra import Mask
from models.ranges import Piece, Some
from models.scores import Tensors
from models.span import Span

POSITIONS = ("cache", "text")


class Streaming(Eviction):
    """`cache=streaming`: `sinks` first tokens of the document and the newest ones.

    Args:
        budget: tokens that a layer holds of each row, those at hand among them. A piece that is
            longer is attended to in full, and cut when the next tokens come.
        sinks: first tokens that stay.
        positions: cache: the sinks stand right before the oldest of the newest tokens, so no
            distance exceeds the budget; text: all tokens stay where they stood in the text.

    Source: Xiao et al. 2023 (arXiv:2309.17453). There all keys are kept without positions and
    rotated at each read, to 0, 1, 2, ... in the cache. Scores depend on distances alone, so ours
    turns the sinks and leaves the others: the same distances.
    """

    def __init__(self, budget: Piece, sinks: Some = 4, positions: str = "cache"):
        super().__init__(budget)
        if not 0 <= sinks < budget:
            raise ValueError(
                f"cache.sinks={sinks} is a part of cache.budget={budget}; use 0 to {budget - 1}"
            )
        if positions not in POSITIONS:
            raise ValueError(
                f"cache.positions={positions} is unknown; use {' or '.join(POSITIONS)}"
            )
        self.sinks = sinks
        self.positions = positions
        self._turns: dict[str, Turn] = {}

    def misfits(self, model: nn.Module) -> list[str]:
        """See KVCacheFactory."""
        sentences = super().misfits(model)
        if self.positions == "text" or sentences:
            return sentences
        return [f"cache.positions=cache: {reason}" for reason in cannot_turn(model)]

    def prepare(self, model: nn.Module) -> None:
        """See KVCacheFactory."""
        if self.positions == "cache":
            self._turns = turns(model)

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "StreamingCache":
        """See KVCacheFactory."""
        turn = None
        if self.positions == "cache":
            turn = self._turns[place]
        return StreamingCache(self.budget, self.sinks, turn)


class StreamingCache(EvictingCache):
    """Drops the oldest tokens that are no sinks before new ones come.

    Args:
        budget, sinks: as in Streaming.
        turn: moves sinks to other positions; None: they stay.
    """

    def __init__(self, budget: int, sinks: int, turn: Turn | None):
        super().__init__(budget)
        self.sinks = sinks
        self.turn = turn
        self._moved: tuple[Span, Span, Tensor] | None = None

    def make_room(self, span: Span) -> None:
        """See EvictingCache."""
        if self.addresses is None:
            return
        coming = span.valid().sum(1)
        current = self.current()
        sinks = current & (self.addresses.pos < self.sinks)
        others = current & ~sinks
        room = (self.budget - coming - sinks.sum(1)).clamp_min(0)
        from_the_end = others.flip(1).long().cumsum(1).flip(1)
        full = current.sum(1) + coming > self.budget
        drops = full & (coming > 0)
        wanted = sinks | others & (from_the_end <= room[:, None])
        self.keep(wanted | ~drops[:, None])

    def read(self) -> tuple[Tensors, Span]:
        """See KVCache; sinks stand right before the others, as if nothing lay between."""
        assert self.addresses is not None, "nothing was appended yet"
        if self.turn is None:
            return super().read()
        if self._moved is None or self._moved[0] is not self.addresses:
            by = self._distance()
            moved = Span(self.addresses.pos + by, self.addresses.doc, self.addresses.role)
            self._moved = self.addresses, moved, by
        _, moved, by = self._moved
        return self._turned(by), moved

    def _turned(self, by: Tensor) -> Sequence[Tensor]:
        """Turns the first slots, among which all sinks are; what moves by 0 is not computed."""
        assert self.turn is not None
        moving = by.any(0).nonzero()
        if not len(moving):
            return self.tensors
        end = int(moving[-1]) + 1
        first = self.turn([tensor[:, :end] for tensor in self.tensors], by[:, :end])
        together = zip(first, self.tensors, strict=True)
        return [torch.cat([head, tensor[:, end:]], 1) for head, tensor in together]

    def _distance(self) -> Tensor:
        """[B, S] tokens by which sinks move on: the length of the gap behind them; 0 for others."""
        assert self.addresses is not None
        current = self.current()
        sinks = current & (self.addresses.pos < self.sinks)
        others = current & ~sinks
        far = torch.iinfo(torch.int64).max
        oldest = self.addresses.pos.masked_fill(~others, far).amin(1)
        after_sinks = self.addresses.pos.masked_fill(~sinks, -1).amax(1) + 1
        gap = (oldest - after_sinks).masked_fill(~(others.any(1) & sinks.any(1)), 0)
        return torch.where(sinks, gap[:, None], 0)
