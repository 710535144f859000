"""Masks of segment recurrence: how far a query sees before the start of its segment.

Segments are counted by address, the tokens of a document with equal pos // size, independent of the
rows in which queries and keys lie.

Letters: B rows, T queries, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.masks.algebra import (
    EMPTY,
    FAR,
    FULL,
    PARTIAL,
    Band,
    Bounds,
    Mask,
    band_of,
    coverage_of,
)
from models.masks.basic import SameChunk
from models.span import READ, Span

# the role of a token of the current row as later segments see it: its input carries no gradient
STALE = 17


@dataclass(frozen=True)
class SegmentRecurrence(Mask):
    """Shows live keys of the query's own segment, and other keys up to `length` tokens before it.

    A key of the current row appears twice: live, for its own segment, and STALE, for later ones.
    Keys of earlier rows (role READ) may belong to either. Keys later than the query are not
    restricted; combine with Causal.

    Args:
        size: tokens in a segment.
        length: tokens before a segment that all of its queries see.
    """

    size: int
    length: int

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        segment_start = (query.pos // self.size * self.size)[:, :, None]
        positions = key.pos[:, None, :]
        roles = key.role[:, None, :]
        within_reach = positions >= segment_start - self.length
        stale = within_reach & (positions < segment_start)
        live = (positions >= segment_start) & (positions < segment_start + self.size)
        seen = torch.where(roles == STALE, stale, live)
        seen = torch.where(roles == READ, within_reach, seen)
        return seen[:, None]

    def coverage(self, query: Bounds, key: Bounds) -> int:
        coverages = set()
        if key.role_low <= READ <= key.role_high:
            coverages.add(self._coverage_read(query, key))
        if key.role_low <= STALE <= key.role_high:
            coverages.add(self._coverage_stale(query, key))
        # bounds of several roles may include any role between them, live ones too
        if key.role_low != key.role_high or key.role_low not in (READ, STALE):
            coverages.add(SameChunk(self.size).coverage(query, key))
        if len(coverages) > 1:
            return PARTIAL
        return coverages.pop()

    def _coverage_read(self, query: Bounds, key: Bounds) -> int:
        """Coverage of keys of earlier rows."""
        first = query.pos_low // self.size * self.size - self.length
        last = query.pos_high // self.size * self.size - self.length
        return coverage_of(key.pos_high < first, key.pos_low >= last)

    def _coverage_stale(self, query: Bounds, key: Bounds) -> int:
        """Coverage of STALE keys, which lie before the query's segment."""
        first_start = query.pos_low // self.size * self.size
        last_start = query.pos_high // self.size * self.size
        if key.pos_low >= last_start:
            return EMPTY
        within_reach = self._coverage_read(query, key)
        if within_reach == FULL and key.pos_high < first_start:
            return FULL
        return min(PARTIAL, within_reach)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        # live keys of the query's segment may be later than the query
        return FAR if self.size > 1 else 0


@dataclass(frozen=True)
class PreviousTokens(Mask):
    """Shows the `length` tokens before the query's segment, and nothing of the segment itself.

    Args:
        size: tokens in a segment.
        length: tokens before a segment that all of its queries see.
    """

    size: int
    length: int

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        segment_start = (query.pos // self.size * self.size)[:, :, None]
        positions = key.pos[:, None, :]
        seen = (positions < segment_start) & (positions >= segment_start - self.length)
        return seen[:, None]

    def coverage(self, query: Bounds, key: Bounds) -> int:
        first_start = query.pos_low // self.size * self.size
        last_start = query.pos_high // self.size * self.size
        empty = key.pos_low >= last_start or key.pos_high < first_start - self.length
        full = key.pos_high < first_start and key.pos_low >= last_start - self.length
        return coverage_of(empty, full)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        # a segment begins at or before its queries, so these tokens are all earlier
        return 0
