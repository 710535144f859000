"""SnapKV: the last queries of the prompt choose which of its tokens each key head keeps.

Letters: B rows, T queries, S slots, H query heads, G key heads.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.cache.eviction.base import Eviction, ScoredCache, best, newest
from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.ranges import Piece
from models.span import Span

POOLINGS = ("mean", "max")


class SnapKV(Eviction):
    """`cache=snapkv`: cuts the prompt once, and holds every generated token.

    Args:
        budget: tokens of the prompt that each key head holds, the window among them.
        window: last tokens of the prompt; they stay, and their queries choose the others.
        kernel: neighbouring tokens over which the scores are pooled; odd.
        pooling: mean or max.

    Source: Li et al. 2024 (arXiv:2404.14469). Weights are averaged over the query heads that share
    a key head, where the paper repeats the key heads. A prompt that comes in several pieces is cut
    after each: what was kept so far competes with the piece, as a prompt of its own. The tokens
    stay in the order of the text, in their code in that of their scores.
    """

    per_head = True

    def __init__(self, budget: Piece, window: int = 16, kernel: int = 5, pooling: str = "mean"):
        super().__init__(budget)
        if not 1 <= window < budget:
            raise ValueError(
                f"cache.window={window} is a part of cache.budget={budget}; use 1 to {budget - 1}"
            )
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"cache.kernel={kernel} has a middle; use an odd number, such as 5")
        if pooling not in POOLINGS:
            raise ValueError(f"cache.pooling={pooling} is unknown; use {' or '.join(POOLINGS)}")
        self.window = window
        self.kernel = kernel
        self.pooling = pooling

    def create(self, place: str, mask: Mask, slots: SlotTable) -> "SnapCache":
        """See KVCacheFactory."""
        return SnapCache(self)


class SnapCache(ScoredCache):
    """Cuts what it holds whenever more than one token of a row came."""

    per_head = True

    def __init__(self, settings: SnapKV):
        super().__init__(settings.budget)
        self.settings = settings

    def observe(self, weights: Tensor, span: Span) -> None:
        """See KVCache; weights [B G, H / G, T, S]."""
        valid = span.valid()
        of_prompt = valid.sum(1) > 1
        if not of_prompt.any():
            return
        current = self.current()
        window = newest(current, self.settings.window)
        prefix = current & ~window
        asking = newest(valid, self.settings.window)
        chosen = weights.masked_fill(~asking[:, None, :, None], 0)
        received = chosen.sum(2).mean(1).masked_fill(~prefix, 0)
        # reported by tests and plots; a choice is made once, so nothing is accumulated
        self.scores = self._pooled(received)
        kept = window | best(self.scores, prefix, self.budget - window.sum(1))
        # rows that generate hold everything
        self.keep(torch.where(of_prompt[:, None], kept, current))

    def _pooled(self, scores: Tensor) -> Tensor:
        """[N, S]: means or maxima over neighbours; beyond the ends there are zeros."""
        kernel = self.settings.kernel
        if self.settings.pooling == "max":
            return F.max_pool1d(scores, kernel, stride=1, padding=kernel // 2)
        return F.avg_pool1d(scores[:, None], kernel, stride=1, padding=kernel // 2)[:, 0]
