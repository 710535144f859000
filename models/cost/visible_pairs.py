"""Exact count of the (head, query, key) triples that a mask lets through, in little memory.

A row is cut into unbroken runs. Pairs of stretches of runs are halved until the mask says that
nothing or everything is visible, or that two runs see each other in a band, whose area has a closed
form. Only what is left is counted densely.
"""

import numpy as np
import torch

from models.masks.algebra import EMPTY, FULL, Bounds, Mask, visible
from models.span import PADDING, Span

TILE = 1024  # tokens on the side of what is counted densely


def visible_triples(mask: Mask, span: Span, heads: int = 1) -> int:
    """Over all rows of `span`, whole rows as they were packed; padding counts for nothing.

    Args:
        heads: of the layer; a mask that treats them alike is counted once and multiplied.
    """
    return sum(
        _RowCount(mask, span.map(lambda x, r=row: x[r : r + 1]), heads).count()
        for row in range(span.shape[0])
    )


def pairs_across(mask: Mask, span: Span, source_span: Span) -> int:
    """Counts the pairs of a token of a row and a token of its source that a mask shows.

    Over all rows, counted densely in stretches of tokens; a mask that tells heads apart is counted
    for the first.
    """
    heads = torch.zeros(1, dtype=torch.long)
    valid = source_span.valid()[:, None, None]
    total = 0
    for start in range(0, span.shape[1], TILE):
        queries = span.map(lambda x, start=start: x[:, start : start + TILE])
        shown = visible(mask, queries, source_span, heads) & valid
        total += int((shown & queries.valid()[:, None, :, None]).sum())
    return total


class _RowCount:
    """One row, its runs, and the box of any stretch of them."""

    def __init__(self, mask: Mask, span: Span, heads: int):
        self.mask = mask
        self.span = span
        self.heads = heads
        pos, doc, role = (x[0].cpu().numpy() for x in (span.pos, span.doc, span.role))
        breaks = 1 + np.flatnonzero(
            (np.diff(doc) != 0) | (np.diff(pos) != 1) | (np.diff(role) != 0)
        )
        edges = [0, *breaks.tolist(), len(pos)] if len(pos) else [0]
        self.runs = [(a, b) for a, b in zip(edges[:-1], edges[1:]) if doc[a] != PADDING]
        first = np.array([a for a, _ in self.runs], dtype=np.int64)
        last = np.array([b - 1 for _, b in self.runs], dtype=np.int64)
        self.bounds = [x[i] for x in (pos, doc, role) for i in (first, last)]
        self.sizes = np.concatenate([[0], np.cumsum(last - first + 1)])

    def count(self) -> int:
        return self._stretch(0, len(self.runs), 0, len(self.runs)) if self.runs else 0

    def _box(self, a: int, b: int) -> Bounds:
        pos_low, pos_high, doc_low, doc_high, role_low, role_high = (
            int(x[a:b].min() if i % 2 == 0 else x[a:b].max()) for i, x in enumerate(self.bounds)
        )
        return Bounds(pos_low, pos_high, doc_low, doc_high, role_low, role_high, run=b - a == 1)

    def _stretch(self, qa: int, qb: int, ka: int, kb: int) -> int:
        """Triples among query runs [qa, qb) and key runs [ka, kb)."""
        q = self._box(qa, qb)
        k = self._box(ka, kb)
        look = self.mask.coverage(q, k)
        if look == EMPTY:
            return 0
        if look == FULL:
            return self.heads * int(
                (self.sizes[qb] - self.sizes[qa]) * (self.sizes[kb] - self.sizes[ka])
            )
        if qb - qa == kb - ka == 1:
            band = self.mask.band(q, k)
            if band is None:
                return self._dense(*self.runs[qa], *self.runs[ka])
            return self.heads * band_area(q, k, band)
        if qb - qa >= kb - ka:
            middle = (qa + qb) // 2
            return self._stretch(qa, middle, ka, kb) + self._stretch(middle, qb, ka, kb)
        middle = (ka + kb) // 2
        return self._stretch(qa, qb, ka, middle) + self._stretch(qa, qb, middle, kb)

    def _dense(self, q0: int, q1: int, k0: int, k1: int) -> int:
        total = 0
        for i in range(q0, q1, TILE):
            for j in range(k0, k1, TILE):
                q, k = (
                    self.span.map(lambda x, a=a, b=b: x[:, a:b])
                    for a, b in ((i, min(i + TILE, q1)), (j, min(j + TILE, k1)))
                )
                seen = self.mask.dense(q, k, torch.arange(self.heads, device=self.span.pos.device))
                total += int(seen.sum()) * (self.heads if seen.shape[1] == 1 else 1)
        return total


def band_area(q: Bounds, k: Bounds, band: tuple[int, int]) -> int:
    """Pairs of two runs whose pos_q - pos_k lies in the band."""
    low, high = band
    return max(0, _below(q, k, high) - _below(q, k, low - 1)) if low <= high else 0


def _below(q: Bounds, k: Bounds, most: int) -> int:
    """Pairs of two runs with pos_q - pos_k <= most: query by query, the keys from pos_q - most
    on."""
    keys = k.pos_high - k.pos_low + 1
    opens = np.arange(q.pos_low, q.pos_high + 1, dtype=np.int64) - most - k.pos_low
    return int((keys - opens.clip(0, keys)).sum())
