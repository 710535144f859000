"""TOVA: the token goes to which the newest query pays least attention, in all heads together.

Letters: B rows, T queries, S slots, H query heads.
"""

import torch
from torch import Tensor

from models.cache.eviction.base import Eviction, ScoredCache, best
from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.ranges import Piece
from models.span import Span


class Tova(Eviction):
    """`cache=tova`: of the tokens of a layer, those that the newest query weighs most.

    Args:
        budget: tokens that a layer holds of each row.

    Source: Oren et al. 2024, token omission via attention (arXiv:2401.06104): weights are averaged
    over heads, and no token is protected, the newest and the first included. A prompt that comes
    in one piece is attended to in full and then cut to the budget by its last query.
    """

    def __init__(self, budget: Piece):
        super().__init__(budget)

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "TovaCache":
        """See KVCacheFactory."""
        return TovaCache(self.budget)


class TovaCache(ScoredCache):
    """Scores tokens by the newest query alone."""

    def observe(self, weights: Tensor, span: Span) -> None:
        """See KVCache."""
        valid = span.valid()
        line = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid, line, -1).amax(1).clamp_min(0)
        index = last[:, None, None, None].expand(-1, weights.shape[1], 1, weights.shape[3])
        received = weights.gather(2, index)[:, :, 0].mean(1)
        asked = valid.any(1)
        # a row without a token in this piece asks nothing, and keeps what it has
        self.scores = torch.where(asked[:, None], received, self.scores_of_slots(received))
        current = self.current()
        count = torch.full_like(last, self.budget)
        wanted = torch.where(asked[:, None], best(self.scores, current, count), current)
        self.keep(wanted)
