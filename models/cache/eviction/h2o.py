"""Heavy hitters: each key head keeps the newest tokens and those that received most attention.

Letters: B rows, T queries, S slots, H query heads, G key heads.
"""

from torch import Tensor

from models.cache.eviction.base import Eviction, ScoredCache, best, newest
from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.ranges import Piece
from models.span import Span


class H2O(Eviction):
    """`cache=h2o`: per key head, `recent` newest tokens and the heaviest of the others.

    Args:
        budget: tokens that each key head holds.
        recent: of these, the newest ones; null: half.

    Source: Zhang et al. 2023 (arXiv:2306.14048), algorithm 1: the score of a token is the sum of
    the weights that all queries so far gave it, and after each token the lightest one goes. A
    prompt that comes in one piece is attended to in full and then cut to the budget at once, as in
    their code. Weights are summed over the query heads that share a key head.
    """

    per_head = True

    def __init__(self, budget: Piece, recent: int | None = None):
        super().__init__(budget)
        self.recent = budget // 2 if recent is None else recent
        if not 0 <= self.recent <= budget:
            raise ValueError(
                f"cache.recent={recent} is a part of cache.budget={budget}; use 0 to {budget}"
            )

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "HeavyHitterCache":
        """See KVCacheFactory."""
        return HeavyHitterCache(self.budget, self.recent)


class HeavyHitterCache(ScoredCache):
    """Accumulates the attention that each token receives.

    Args:
        budget, recent: as in H2O.
    """

    per_head = True

    def __init__(self, budget: int, recent: int):
        super().__init__(budget)
        self.recent = recent

    def observe(self, weights: Tensor, span: Span) -> None:
        """See KVCache; weights [B G, H / G, T, S]."""
        # padding may hold anything, and its weights too
        received = weights.masked_fill(~span.valid()[:, None, :, None], 0).sum((1, 2))
        self.scores = self.scores_of_slots(received) + received
        current = self.current()
        recent = newest(current, self.recent)
        others = current & ~recent
        heavy = best(self.scores, others, self.budget - recent.sum(1))
        self.keep(recent | heavy)
