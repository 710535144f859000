"""Lists, for every block of queries, the blocks of keys that it needs, and the other way round.

Made of the tiles of models/kernels/block_plan.py: a pair of blocks is left out, computed without a
look at the mask, or computed with it.

Letters: B rows, T queries, S keys, M blocks of queries, N blocks of keys, R ranges.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.kernels.block_plan import (
    CAUSAL_TILE,
    FULL_TILE,
    LEAF,
    PARTIAL_TILE,
    RowTokens,
    Tile,
    block_outlook,
    on_host,
    plan_tiles,
)
from models.masks.algebra import EMPTY, FULL, PARTIAL, Bounds, Mask
from models.span import Span, to_device

HIDDEN, MASKED, CLEAR = 0, 1, 2  # of a pair of blocks
OUTLOOKS = {EMPTY: HIDDEN, PARTIAL: MASKED, FULL: CLEAR}


class Ranges(NamedTuple):
    """The blocks of the other axis that each block needs.

    Attributes:
        index: [B, M, 4] int32: first and end of the CLEAR ranges, then of the MASKED ones.
        ranges: [R, 2] int32: first block and end of each.
    """

    index: Tensor
    ranges: Tensor


class BlockLists(NamedTuple):
    """Blocks of keys that queries need, and blocks of queries that need keys."""

    of_queries: Ranges
    of_keys: Ranges


def needs_mask(mask: Mask, span: Span, kv_span: Span) -> bool:
    """Returns whether some tile of the plan can only be told apart pair by pair."""
    return any(tile.kind == PARTIAL_TILE for tile in plan_tiles(mask, span, kv_span))


def block_lists(mask: Mask, span: Span, kv_span: Span, sides: tuple[int, int]) -> BlockLists:
    """Returns the lists for blocks of (queries, keys); made once for all layers."""

    def build() -> BlockLists:
        return _build(mask, span, kv_span, sides)

    return span.cache.get(("blocks of pairs", mask, sides), build, kv_span)


def _build(mask: Mask, span: Span, kv_span: Span, sides: tuple[int, int]) -> BlockLists:
    rows, queries = span.shape
    keys = kv_span.shape[1]
    of_queries = _Collector(rows, -(-queries // sides[0]))
    of_keys = _Collector(rows, -(-keys // sides[1]))
    hosts = on_host(span), on_host(kv_span)
    groups: dict[tuple[int, int], list[Tile]] = {}
    for tile in plan_tiles(mask, span, kv_span):
        groups.setdefault((tile.r0, tile.r1), []).append(tile)
    for (r0, r1), members in groups.items():
        marks = _marks(members, queries, keys, sides)
        _ask_again(mask, marks, [_boxes(x, r0, side) for x, side in zip(hosts, sides)])
        if keys % sides[1]:
            # Beyond the keys the last block loads zeros, which only the mask keeps from counting.
            np.minimum(marks[:, -1], MASKED, out=marks[:, -1])
        of_queries.add(slice(r0, r1), marks)
        of_keys.add(slice(r0, r1), marks.T)
    device = span.pos.device
    return BlockLists(of_queries.on(device), of_keys.on(device))


def _marks(tiles: list[Tile], queries: int, keys: int, sides: tuple[int, int]) -> np.ndarray:
    """[M, N] uint8: HIDDEN, MASKED or CLEAR."""
    high, wide = sides
    marks = np.zeros((-(-queries // high), -(-keys // wide)), dtype=np.uint8)
    for _, _, q0, q1, k0, k1, kind in tiles:
        if kind != CAUSAL_TILE:
            # The last block of queries may be cut short: what lies beyond is not stored.
            last = len(marks) if q1 == queries else q1 // high
            touched = marks[q0 // high : -(-q1 // high), k0 // wide : -(-k1 // wide)]
            np.maximum(touched, MASKED, out=touched)
            if kind == FULL_TILE:
                marks[-(-q0 // high) : last, -(-k0 // wide) : k1 // wide] = CLEAR
            continue
        for block in range(q0 // high, -(-q1 // high)):
            start = max(block * high, q0)
            stop = min(block * high + high, q1)
            touched = marks[block, k0 // wide : -(-(k0 + stop - q0) // wide)]
            np.maximum(touched, MASKED, out=touched)
            if start == block * high and stop == min(block * high + high, queries):
                # The first query of the block sees fewest.
                marks[block, -(-k0 // wide) : (k0 + start - q0 + 1) // wide] = CLEAR
    return marks


def _boxes(host: list[np.ndarray], row: int, side: int) -> list[Bounds]:
    """Returns the bounds of every block of a row."""
    tokens = RowTokens([each[row] for each in host], LEAF)
    size = len(tokens.pos)
    return [tokens.box(start, min(start + side, size)) for start in range(0, size, side)]


def _ask_again(mask: Mask, marks: np.ndarray, boxes: list[list[Bounds]]) -> None:
    """Looks at the masked pairs one by one, in place: tiles are larger than blocks."""
    queries, keys = boxes
    for i, j in np.argwhere(marks == MASKED).tolist():
        marks[i, j] = OUTLOOKS[block_outlook(mask, queries[i], keys[j])]


class _Collector:
    """Collects the ranges of all rows."""

    def __init__(self, rows: int, blocks: int):
        self.index = np.zeros((rows, blocks, 4), dtype=np.int32)
        self.ranges: list[np.ndarray] = []
        self.count = 0

    def add(self, rows: slice, marks: np.ndarray) -> None:
        """Adds the ranges of rows that share a plan, [M, N]."""
        for column, kind in ((0, CLEAR), (2, MASKED)):
            counts, ranges = _ranges(marks == kind)
            ends = self.count + np.cumsum(counts)
            self.index[rows, :, column] = ends - counts
            self.index[rows, :, column + 1] = ends
            self.ranges.append(ranges)
            self.count += len(ranges)

    def on(self, device: torch.device) -> Ranges:
        """Returns them on a device; one empty range where there are none."""
        ranges = np.concatenate([*self.ranges, np.zeros((1, 2), dtype=np.int32)])
        return Ranges(to_device(self.index, device), to_device(ranges, device))


def _ranges(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (ranges of each line [M], first and end of them all [R, 2]) of chosen [M, N]."""
    edge = np.zeros((len(chosen), 1), dtype=np.int8)
    steps = np.diff(np.concatenate([edge, chosen.astype(np.int8), edge], 1), axis=1)
    lines, starts = np.nonzero(steps == 1)
    _, stops = np.nonzero(steps == -1)
    counts = np.bincount(lines, minlength=len(chosen))
    return counts, np.stack([starts, stops], 1).astype(np.int32)
