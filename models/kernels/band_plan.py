"""Plans an attention as few calls of a kernel for packed sequences, where its mask is bands.

Between two unbroken runs of tokens most masks are a band: every query sees the keys whose distance
lies between two bounds. Kernels for packed sequences take many pairs of stretches at once, each
stretch of queries with its stretch of keys, and one pair of bounds for all, counted from the last
query and the last key of a stretch. So documents of a row, windows and the parts of a ring are one
call or two where tiles would be hundreds.

Letters: B rows, T queries, S keys, N and M tokens of a call, D stretches.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.kernels.block_plan import (
    FULL_TILE,
    RowTokens,
    TilePlanner,
    block_outlook,
    join_tiles,
    on_host,
    row_labels,
)
from models.masks.algebra import EMPTY, FULL, Mask
from models.plans import planned
from models.span import Span, to_device

EVERY = -1  # a bound that hides nothing
# Stretches of at least so many tokens on average fill a GPU alone: kernels for one pair of
# sequences are faster there.
LONG = 1024


class BandStretch(NamedTuple):
    """Queries [q0, q1) and keys [k0, k1) of one row, the first and the last of which see something.

    Query i of t sees keys i + s - t - left to i + s - t + right of s; EVERY is without bound.
    """

    q0: int
    q1: int
    k0: int
    k1: int
    left: int
    right: int


class BandCall(NamedTuple):
    """One call of a kernel for packed sequences; stretch i of the queries sees that of the keys.

    Attributes:
        queries: [N] int64, row * T + token of each query, each once; a slice where they follow each
            other.
        keys: [M] int64, row * S + token of each key; a slice where they follow each other.
        query_ends, key_ends: [D + 1] int32, 0 and the end of each stretch.
        longest_query, longest_key: tokens of the longest stretch.
        left, right: bounds of all its stretches.
    """

    queries: Tensor | slice
    keys: Tensor | slice
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int
    left: int
    right: int


class _BandPlanner(TilePlanner):
    """Collects the stretches of one row; `banded` turns False where two runs are no band."""

    def __init__(self, mask: Mask, q: RowTokens, k: RowTokens):
        self.stretches: list[BandStretch] = []
        self.banded = True
        super().__init__(mask, q, k)
        for q0, q1, k0, k1, _ in join_tiles(self.blocks):
            self.stretches.append(BandStretch(q0, q1, k0, k1, EVERY, EVERY))

    def triangle(self, q0: int, q1: int, k0: int, k1: int) -> None:
        """Plans tokens against themselves, of which query i sees keys 0..i."""
        self.stretches.append(BandStretch(q0, q1, k0, k1, EVERY, 0))

    def inside(self, q0: int, q1: int, k0: int, k1: int) -> None:
        """Plans one run against one run."""
        query = self.q.box(q0, q1)
        key = self.k.box(k0, k1)
        look = block_outlook(self.mask, query, key)
        if look == FULL:
            self.blocks.append((q0, q1, k0, k1, FULL_TILE))
            return
        band = self.mask.band(query, key) if query.run and key.run else None
        if look != EMPTY and band is None:
            self.banded = False
        elif look != EMPTY and band is not None:
            self._clip(q0, q1, k0, k1, band, query.pos_low - key.pos_low)

    def _clip(self, q0: int, q1: int, k0: int, k1: int, band: tuple[int, int], ahead: int) -> None:
        """Leaves out the ends that see nothing, or are not seen.

        Args:
            band: lowest and highest visible distance.
            ahead: position of the first query less that of the first key.
        """
        if band[0] > band[1]:
            return
        # Key j is seen by query i where low <= i - j <= high.
        low = band[0] - ahead
        high = band[1] - ahead
        first_query = max(0, low)
        last_query = min(q1 - q0 - 1, k1 - k0 - 1 + high)
        first_key = max(0, first_query - high)
        last_key = min(k1 - k0 - 1, last_query - low)
        if first_query > last_query or first_key > last_key:
            return
        # The last query and the last key are at distance last_query - last_key.
        right = (last_query - last_key) - low
        keys = last_key - first_key + 1
        if keys <= right < last_query - first_query:
            # Kernels take a bound of as many keys as there are for none: the queries that see the
            # last key are a stretch of their own.
            middle = last_key + low
            self._add(q0, k0, (first_query, middle), (first_key, last_key), low, high)
            first_query = middle + 1
            first_key = max(0, first_query - high)
        self._add(q0, k0, (first_query, last_query), (first_key, last_key), low, high)

    def _add(
        self, q0: int, k0: int, query: tuple[int, int], key: tuple[int, int], low: int, high: int
    ) -> None:
        """Adds the stretch of these first and last queries and keys, counted from q0 and k0.

        Key j is seen by query i where low <= i - j <= high.
        """
        apart = query[1] - key[1]
        left = high - apart
        right = apart - low
        if left >= key[1] - key[0]:
            left = EVERY
        if right >= query[1] - query[0]:
            right = EVERY
        span = (q0 + query[0], q0 + query[1] + 1, k0 + key[0], k0 + key[1] + 1)
        if left == right == EVERY:
            self.blocks.append((*span, FULL_TILE))
        else:
            self.stretches.append(BandStretch(*span, left, right))


@planned
def plan_bands(
    mask: Mask, span: Span, kv_span: Span, long_too: bool = False
) -> list[BandCall] | None:
    """Returns the calls that queries need of keys; cached on `span` for other layers.

    None where the mask is no band between some runs, or, if not `long_too`, where stretches are so
    long that kernels for one pair of sequences serve better.
    """

    def build() -> list[BandCall] | None:
        return _plan(mask, span, kv_span, long_too)

    return span.cache.get(("bands", mask, long_too), build, kv_span)


def _plan(mask: Mask, span: Span, kv_span: Span, long_too: bool) -> list[BandCall] | None:
    queries = on_host(span)
    keys = on_host(kv_span)
    plans: dict[bytes, list[BandStretch]] = {}
    rows = []
    for row, label in enumerate(row_labels(queries, keys)):
        if label not in plans:
            query_tokens = RowTokens([each[row] for each in queries], 0)
            key_tokens = RowTokens([each[row] for each in keys], 0)
            planner = _BandPlanner(mask, query_tokens, key_tokens)
            if not planner.banded:
                return None
            plans[label] = sorted(planner.stretches)
        rows.append(plans[label])
    stretches = [stretch for row in rows for stretch in row]
    if not long_too and stretches and all(_is_dense(each) for each in stretches):
        area = sum((each.q1 - each.q0) * (each.k1 - each.k0) for each in stretches)
        if area >= LONG * LONG * len(stretches):
            return None
    return _calls(rows, span.shape[1], kv_span.shape[1], span.pos.device)


def _is_dense(stretch: BandStretch) -> bool:
    """Tells whether a kernel's own causal flag, or none, is all that this stretch needs."""
    return stretch.left == EVERY and stretch.right in (EVERY, 0)


def _calls(
    rows: list[list[BandStretch]], queries: int, keys: int, device: torch.device
) -> list[BandCall]:
    """Joins stretches that the same bounds serve, no query twice in a call."""
    wanted = sorted({(each.left, each.right) for row in rows for each in row}, reverse=True)
    groups: dict[tuple[int, int, int], list[BandStretch]] = {}
    for row, stretches in enumerate(rows):
        free: dict[tuple[int, int, int], int] = {}
        for each in stretches:
            # The tightest bounds that hide nothing of it, so that short documents join long ones.
            left, right = next(bounds for bounds in wanted if _serves(bounds, each))
            turn = 0
            # Stretches are sorted by their first query.
            while free.get((left, right, turn), 0) > each.q0:
                turn += 1
            free[left, right, turn] = each.q1
            q0 = row * queries + each.q0
            k0 = row * keys + each.k0
            moved = BandStretch(
                q0,
                q0 + each.q1 - each.q0,
                k0,
                k0 + each.k1 - each.k0,
                left,
                right,
            )
            groups.setdefault((left, right, turn), []).append(moved)
    return [_call(group, device) for group in groups.values()]


def _serves(bounds: tuple[int, int], stretch: BandStretch) -> bool:
    """Tells whether these bounds show a stretch what its own do."""
    left, right = bounds
    as_left = left == stretch.left or (
        stretch.left == EVERY and left >= stretch.k1 - stretch.k0 - 1
    )
    as_right = right == stretch.right or (
        stretch.right == EVERY and right >= stretch.q1 - stretch.q0 - 1
    )
    return as_left and as_right


def _call(group: list[BandStretch], device: torch.device) -> BandCall:
    query_edges = [(each.q0, each.q1) for each in group]
    key_edges = [(each.k0, each.k1) for each in group]
    return BandCall(
        _tokens(query_edges, device),
        _tokens(key_edges, device),
        _ends(query_edges, device),
        _ends(key_edges, device),
        max(stop - start for start, stop in query_edges),
        max(stop - start for start, stop in key_edges),
        group[0].left,
        group[0].right,
    )


def _tokens(edges: list[tuple[int, int]], device: torch.device) -> Tensor | slice:
    if all(before[1] == after[0] for before, after in zip(edges[:-1], edges[1:])):
        return slice(edges[0][0], edges[-1][1])
    index = np.concatenate([np.arange(start, stop) for start, stop in edges])
    return to_device(index, device)


def _ends(edges: list[tuple[int, int]], device: torch.device) -> Tensor:
    lengths = [0, *(stop - start for start, stop in edges)]
    return to_device(np.cumsum(lengths), device, torch.int32)
