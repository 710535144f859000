"""Masks of segment recurrence: how far a query sees over the edge of its segment, whichever row a
key lies in.

Segments are counted by address: the tokens of a document with equal pos // size, wherever rows are
cut.
Letters: B rows, T queries, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.masks.algebra import (
    EMPTY,
    EMPTY_BAND,
    FAR,
    FULL,
    FULL_BAND,
    PARTIAL,
    Band,
    Bounds,
    Mask,
)
from models.masks.basic import SameChunk
from models.span import READ, Span

# the role of a token of the row at hand as later segments see it: its input carries no gradient
STALE = 17


@dataclass(frozen=True)
class SegmentRecurrence(Mask):
    """Of live keys those of the query's own segment, of others also the `length` tokens before
    that.

    A key of the row at hand is there twice: live, for its own segment, and STALE, for later ones.
    Keys of earlier rows (role READ) may belong to either. Says nothing of keys that come later than
    the query: other masks do.

    Args:
        size: tokens in a segment.
        length: M, tokens before a segment that all of it sees.
    """

    size: int
    length: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        start = (q.pos // self.size * self.size)[:, :, None]
        pos = k.pos[:, None, :]
        role = k.role[:, None, :]
        near = pos >= start - self.length
        live = (pos >= start) & (pos < start + self.size)
        return torch.where(
            role == READ, near, torch.where(role == STALE, near & (pos < start), live)
        )[:, None]

    def coverage(self, q: Bounds, k: Bounds) -> int:
        looks = {
            look(q, k)
            for role, look in ((READ, self._read), (STALE, self._stale))
            if k.role_low <= role <= k.role_high
        }
        if k.role_low != k.role_high or k.role_low not in (READ, STALE):
            looks.add(SameChunk(self.size).coverage(q, k))
        return looks.pop() if len(looks) == 1 else PARTIAL

    def _read(self, q: Bounds, k: Bounds) -> int:
        first, last = (
            pos // self.size * self.size - self.length for pos in (q.pos_low, q.pos_high)
        )
        return EMPTY if k.pos_high < first else FULL if k.pos_low >= last else PARTIAL

    def _stale(self, q: Bounds, k: Bounds) -> int:
        first, last = (pos // self.size * self.size for pos in (q.pos_low, q.pos_high))
        if k.pos_low >= last:
            return EMPTY
        return (
            FULL
            if self._read(q, k) == FULL and k.pos_high < first
            else min(PARTIAL, self._read(q, k))
        )

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return {EMPTY: EMPTY_BAND, PARTIAL: None, FULL: FULL_BAND}[self.coverage(q, k)]

    def causal_from(self) -> int:
        return FAR if self.size > 1 else 0


@dataclass(frozen=True)
class PreviousTokens(Mask):
    """The `length` tokens before the query's segment, whichever row they lie in, and nothing of the
    segment itself.

    Args:
        size: tokens in a segment.
        length: tokens before a segment that all of it sees.
    """

    size: int
    length: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        start = (q.pos // self.size * self.size)[:, :, None]
        pos = k.pos[:, None, :]
        return ((pos < start) & (pos >= start - self.length))[:, None]

    def coverage(self, q: Bounds, k: Bounds) -> int:
        first, last = (pos // self.size * self.size for pos in (q.pos_low, q.pos_high))
        if k.pos_low >= last or k.pos_high < first - self.length:
            return EMPTY
        return FULL if k.pos_high < first and k.pos_low >= last - self.length else PARTIAL

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return {EMPTY: EMPTY_BAND, PARTIAL: None, FULL: FULL_BAND}[self.coverage(q, k)]

    def causal_from(self) -> int:
        return 0
