"""Masks of sparse attention: landmarks that see and are seen by all, dilated windows, blocks,
random blocks.

All are pure functions of addresses (positions count from the start of a document, so packing
changes nothing) and of seeds. Which key a query sees through any of them, together with Causal,
never depends on tokens after the query.

Letters: B rows, H heads, T queries, S keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.counter_rng import hash_words
from models.masks.algebra import EMPTY, EMPTY_BAND, FAR, FULL, PARTIAL, Band, Bounds, Mask
from models.span import Span


@dataclass(frozen=True)
class DilatedWindow(Mask):
    """A window to both sides, dilated by a gap for each head: positions 0, gap, 2 gap, ... (reach -
    1) gap away.

    Args:
        window: positions seen to one side, the query itself among them.
        dilation: for each (global) head its gap, or one for all heads; 1 = no holes.
    """

    window: int
    dilation: tuple[int, ...] = (1,)

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window is a number of tokens and counts the query itself; got {self.window}, want"
                " 1 or more"
            )
        if not self.dilation or min(self.dilation) < 1:
            raise ValueError(
                "gaps are distances in tokens, 1 or more, one for each head; got"
                f" {list(self.dilation)}"
            )

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        apart = (q.pos[:, :, None] - k.pos[:, None, :]).abs()[:, None]
        if len(set(self.dilation)) == 1:
            gap = self.dilation[0]
            return (apart < self.window * gap) & (apart % gap == 0)
        if heads is None:
            raise ValueError("a window with a gap for each head needs the heads' numbers")
        gap = torch.tensor(self.dilation, device=apart.device)[heads].view(-1, 1, 1)
        return (apart < self.window * gap) & (apart % gap == 0)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        nearest = max(q.pos_low - k.pos_high, k.pos_low - q.pos_high, 0)
        furthest = max(q.pos_high - k.pos_low, k.pos_high - q.pos_low)
        if nearest > (self.window - 1) * max(self.dilation):
            return EMPTY
        return FULL if furthest < self.window and max(self.dilation) == 1 else PARTIAL

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return (1 - self.window, self.window - 1) if max(self.dilation) == 1 else None

    def causal_from(self) -> int:
        return FAR if self.window > 1 else 0


@dataclass(frozen=True)
class NeighborBlocks(Mask):
    """Positions are cut into blocks; a query sees its own block and `window` blocks to each
    side."""

    block: int
    window: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 0:
            raise ValueError(
                f"block={self.block} is a number of tokens (1 or more), window={self.window} of"
                " blocks (0 or more)"
            )

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        apart = (q.pos // self.block)[:, :, None] - (k.pos // self.block)[:, None, :]
        return (apart.abs() <= self.window)[:, None]

    def coverage(self, q: Bounds, k: Bounds) -> int:
        q_low, q_high, k_low, k_high = (
            p // self.block for p in (q.pos_low, q.pos_high, k.pos_low, k.pos_high)
        )
        if max(q_low - k_high, k_low - q_high) > self.window:
            return EMPTY
        return FULL if max(q_high - k_low, k_high - q_low) <= self.window else PARTIAL

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return None

    def causal_from(self) -> int:
        return FAR if self.window or self.block > 1 else 0


@dataclass(frozen=True)
class RandomBlocks(Mask):
    """Each block of queries sees `count` blocks drawn from those before its window and after the
    first ones.

    The stretch that may be drawn from is cut into `count` equal parts and one block is drawn from
    each, so that they are different, spread out, and as likely as any. With fewer blocks than
    `count`, all are seen. A pure function of (seed, layer, pattern, block number): the same in
    training and evaluation, in every document, whatever comes later.

    Args:
        block: tokens in a block; window: blocks before its own that a query sees anyway; first:
        blocks at the start of a document that all see anyway; patterns: how many different draws
        there are, 1 or one for each (global) head.
        both: links are seen from both ends, so that the masks of bidirectional attention are
            symmetric.
    """

    block: int
    window: int
    first: int
    count: int
    seed: int
    layer: int
    patterns: int = 1
    both: bool = False

    def drawn(self, block: Tensor, patterns: Tensor) -> Tensor:
        """[P, *block.shape, count] int64: the blocks that these blocks see, -1 where there is none
        to draw."""
        block, pattern = block[None, ..., None], patterns.view(-1, *[1] * (block.dim() + 1))
        part = torch.arange(self.count, device=block.device)
        free = (block - self.window - self.first).clamp_min(0)
        low = part * free // self.count
        high = (part + 1) * free // self.count
        word = hash_words(self.seed, self.layer, pattern, block, part)
        return torch.where(high > low, self.first + low + word % (high - low).clamp_min(1), -1)

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        if self.patterns > 1 and heads is None:
            raise ValueError("random blocks for each head need the heads' numbers")
        patterns = (
            heads
            if self.patterns > 1 and heads is not None
            else torch.zeros(1, dtype=torch.long, device=q.pos.device)
        )
        q_block = q.pos // self.block
        k_block = k.pos // self.block
        seen = _linked(self.drawn(q_block, patterns), k_block)
        return (
            seen | _linked(self.drawn(k_block, patterns), q_block).transpose(-1, -2)
            if self.both
            else seen
        )

    def coverage(self, q: Bounds, k: Bounds) -> int:
        q_low, q_high, k_low, k_high = (
            p // self.block for p in (q.pos_low, q.pos_high, k.pos_low, k.pos_high)
        )
        linked = self._any(q_low, q_high, k_low, k_high) or (
            self.both and self._any(k_low, k_high, q_low, q_high)
        )
        return PARTIAL if linked else EMPTY

    def _any(self, q_low: int, q_high: int, k_low: int, k_high: int) -> bool:
        table = _table(self, 1 << q_high.bit_length())[q_low : q_high + 1]
        return bool(((table >= k_low) & (table <= k_high)).any())

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return EMPTY_BAND if self.coverage(q, k) == EMPTY else None

    def causal_from(self) -> int:
        return FAR if self.both else 0  # blocks are drawn from those before


def _linked(drawn: Tensor, other: Tensor) -> Tensor:
    """[B, P, T, S] bool: is the block `other` [B, S] among those `drawn` [P, B, T, count]?"""
    seen = torch.zeros(*drawn.shape[:3], other.shape[1], dtype=torch.bool, device=other.device)
    for part in drawn.unbind(-1):
        seen |= part[..., None] == other[:, None, :]
    return seen.transpose(0, 1)


@lru_cache(maxsize=256)
def _table(mask: RandomBlocks, blocks: int) -> np.ndarray:
    """[blocks, patterns x count]: what each block sees, kept on the host for planning."""
    drawn = mask.drawn(torch.arange(blocks), torch.arange(mask.patterns))
    return drawn.transpose(0, 1).flatten(1).numpy()
