"""Masks of sparse attention: dilated windows, neighbouring blocks and random blocks.

All are pure functions of addresses (positions count from the start of a document, so packing
changes nothing) and of seeds. Combined with Causal, none depends on tokens after the query.

Letters: B rows, H heads, T queries, S keys.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from models.counter_rng import hash_words
from models.masks.algebra import (
    EMPTY,
    EMPTY_BAND,
    FAR,
    PARTIAL,
    Band,
    Bounds,
    Mask,
    coverage_of,
    distance,
)
from models.span import Span, to_device

MOST_BLOCKS = 1 << 22  # blocks of a row whose links are looked up


@dataclass(frozen=True)
class DilatedWindow(Mask):
    """Shows a window to both sides with a gap per head: 0, gap, ... (window - 1) gap away.

    Args:
        window: positions seen to one side, the query itself among them.
        dilation: the gap of each (global) head, or one for all heads; 1 = no holes.
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
                f"dilation={list(self.dilation)}: distances in tokens, one for each head, must be 1"
                " or more"
            )

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        separation = distance(query, key).abs()
        # one gap for all heads needs no head axis, which would multiply the mask's memory
        if len(set(self.dilation)) == 1:
            gap = self.dilation[0]
        elif heads is None:
            raise ValueError("heads=None: a dilation for each head needs the global head numbers")
        else:
            gap = to_device(self.dilation, separation.device)[heads].view(-1, 1, 1)
        return (separation < self.window * gap) & (separation % gap == 0)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        nearest = max(query.pos_low - key.pos_high, key.pos_low - query.pos_high, 0)
        furthest = max(query.pos_high - key.pos_low, key.pos_high - query.pos_low)
        empty = nearest > (self.window - 1) * max(self.dilation)
        return coverage_of(empty, furthest < self.window and max(self.dilation) == 1)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        if max(self.dilation) > 1:
            return None
        return 1 - self.window, self.window - 1

    def causal_from(self) -> int:
        return FAR if self.window > 1 else 0


@dataclass(frozen=True)
class NeighborBlocks(Mask):
    """Shows the query's own block of positions and `window` blocks to each side."""

    block: int
    window: int

    def __post_init__(self) -> None:
        if self.block < 1 or self.window < 0:
            raise ValueError(
                f"block={self.block}, window={self.window}: tokens in a block must be 1 or more,"
                " blocks to each side 0 or more"
            )

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        query_block = query.pos // self.block
        key_block = key.pos // self.block
        separation = (query_block[:, :, None] - key_block[:, None, :]).abs()
        return (separation <= self.window)[:, None]

    def coverage(self, query: Bounds, key: Bounds) -> int:
        query_low = query.pos_low // self.block
        query_high = query.pos_high // self.block
        key_low = key.pos_low // self.block
        key_high = key.pos_high // self.block
        nearest = max(query_low - key_high, key_low - query_high)
        furthest = max(query_high - key_low, key_high - query_low)
        return coverage_of(nearest > self.window, furthest <= self.window)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return None

    def causal_from(self) -> int:
        # with one block of one token a query sees only itself
        return FAR if self.window or self.block > 1 else 0


@dataclass(frozen=True)
class RandomBlocks(Mask):
    """Shows each block of queries `count` random blocks between the first ones and its window.

    The eligible blocks are divided into `count` equal parts and one block is drawn from each, so
    that the blocks differ, spread out, and are equally likely. With fewer eligible blocks than
    `count`, all are visible. A pure function of (seed, layer, pattern, block number): the same in
    training and evaluation, and in every document, independent of later tokens.

    Args:
        block: tokens in a block.
        window: blocks before its own that a query sees anyway.
        first: blocks at the start of a document that all queries see anyway.
        count: blocks to draw.
        seed, layer: determine the draw.
        patterns: number of different draws: 1, or one for each (global) head.
        both: links are visible from both ends, so that masks of bidirectional attention are
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
        """[P, *block.shape, count] int64: the blocks that these blocks see, -1 for no block."""
        pattern = patterns.view(-1, *[1] * (block.dim() + 1))
        block = block[None, ..., None]
        part = torch.arange(self.count, device=block.device)
        eligible = (block - self.window - self.first).clamp_min(0)
        low = part * eligible // self.count
        high = (part + 1) * eligible // self.count
        word = hash_words(self.seed, self.layer, pattern, block, part)
        picked = self.first + low + word % (high - low).clamp_min(1)
        return torch.where(high > low, picked, -1)

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        if self.patterns > 1 and heads is None:
            raise ValueError("heads=None: random blocks for each head need global head numbers")
        patterns = torch.zeros(1, dtype=torch.long, device=query.pos.device)
        if self.patterns > 1 and heads is not None:
            patterns = heads
        query_block = query.pos // self.block
        key_block = key.pos // self.block
        seen = _linked(self.drawn(query_block, patterns), key_block)
        if self.both:
            seen = seen | _linked(self.drawn(key_block, patterns), query_block).transpose(-1, -2)
        return seen

    def coverage(self, query: Bounds, key: Bounds) -> int:
        query_blocks = (query.pos_low // self.block, query.pos_high // self.block)
        key_blocks = (key.pos_low // self.block, key.pos_high // self.block)
        linked = self._any_link(query_blocks, key_blocks)
        if self.both:
            linked = linked or self._any_link(key_blocks, query_blocks)
        # never FULL: heads and blocks of the same box draw differently
        return PARTIAL if linked else EMPTY

    def _any_link(self, sources: tuple[int, int], targets: tuple[int, int]) -> bool:
        """True if any source block has drawn a target block, both inclusive ranges."""
        first, last = sources
        if last >= MOST_BLOCKS:
            # bounds of tokens to come have no end, and no table is that long
            return True
        # a power of two, so that growing documents reuse the cached table
        table = _table(self, 1 << last.bit_length())[first : last + 1]
        return bool(((table >= targets[0]) & (table <= targets[1])).any())

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return EMPTY_BAND if self.coverage(query, key) == EMPTY else None

    def causal_from(self) -> int:
        # blocks are drawn from earlier ones; only the reverse links look ahead
        return FAR if self.both else 0


def _linked(drawn: Tensor, other: Tensor) -> Tensor:
    """[B, P, T, S] bool: True where block `other` [B, S] is among `drawn` [P, B, T, count]."""
    seen = torch.zeros(*drawn.shape[:3], other.shape[1], dtype=torch.bool, device=other.device)
    # a loop over the draws, because [P, B, T, S, count] would not fit into memory
    for part in drawn.unbind(-1):
        seen |= part[..., None] == other[:, None, :]
    return seen.transpose(0, 1)


@lru_cache(maxsize=256)
def _table(mask: RandomBlocks, blocks: int) -> np.ndarray:
    """[blocks, patterns x count]: the blocks that each block sees, on the host for planning."""
    drawn = mask.drawn(torch.arange(blocks), torch.arange(mask.patterns))
    return drawn.transpose(0, 1).flatten(1).numpy()
