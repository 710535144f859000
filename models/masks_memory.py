"""Masks of segment recurrence: how far a query sees over the edge of its segment, whichever row a key lies in.

Segments are counted by address: the tokens of a document with equal pos // size, wherever rows are cut.
Letters: B rows, T queries, S keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.masks import ALL, EMPTY, EVERY, FAR, NONE, SOME, Band, Box, Chunk, Mask
from models.span import READ, Span

STALE = 17  # the role of a token of the row at hand as later segments see it: its input carries no gradient


@dataclass(frozen=True)
class Recalled(Mask):
    """Of live keys those of the query's own segment, of others also the `length` tokens before that.

    A key of the row at hand is there twice: live, for its own segment, and STALE, for later ones. Keys of earlier rows (role
    READ) may belong to either. Says nothing of keys that come later than the query: other masks do.

    Args:
        size: tokens in a segment.
        length: M, tokens before a segment that all of it sees.
    """

    size: int
    length: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        start = (q.pos // self.size * self.size)[:, :, None]
        pos, role = k.pos[:, None, :], k.role[:, None, :]
        near = pos >= start - self.length
        live = (pos >= start) & (pos < start + self.size)
        return torch.where(role == READ, near, torch.where(role == STALE, near & (pos < start), live))[:, None]

    def outlook(self, q: Box, k: Box) -> int:
        looks = {look(q, k) for role, look in ((READ, self._read), (STALE, self._stale)) if k.role_low <= role <= k.role_high}
        if k.role_low != k.role_high or k.role_low not in (READ, STALE):
            looks.add(Chunk(self.size).outlook(q, k))
        return looks.pop() if len(looks) == 1 else SOME

    def _read(self, q: Box, k: Box) -> int:
        first, last = (pos // self.size * self.size - self.length for pos in (q.pos_low, q.pos_high))
        return NONE if k.pos_high < first else ALL if k.pos_low >= last else SOME

    def _stale(self, q: Box, k: Box) -> int:
        first, last = (pos // self.size * self.size for pos in (q.pos_low, q.pos_high))
        if k.pos_low >= last:
            return NONE
        return ALL if self._read(q, k) == ALL and k.pos_high < first else min(SOME, self._read(q, k))

    def band(self, q: Box, k: Box) -> Band | None:
        return {NONE: EMPTY, SOME: None, ALL: EVERY}[self.outlook(q, k)]

    def causal_from(self) -> int:
        return FAR if self.size > 1 else 0


@dataclass(frozen=True)
class Earlier(Mask):
    """The `length` tokens before the query's segment, whichever row they lie in, and nothing of the segment itself.

    Args:
        size: tokens in a segment.
        length: tokens before a segment that all of it sees.
    """

    size: int
    length: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        start, pos = (q.pos // self.size * self.size)[:, :, None], k.pos[:, None, :]
        return ((pos < start) & (pos >= start - self.length))[:, None]

    def outlook(self, q: Box, k: Box) -> int:
        first, last = (pos // self.size * self.size for pos in (q.pos_low, q.pos_high))
        if k.pos_low >= last or k.pos_high < first - self.length:
            return NONE
        return ALL if k.pos_high < first and k.pos_low >= last - self.length else SOME

    def band(self, q: Box, k: Box) -> Band | None:
        return {NONE: EMPTY, SOME: None, ALL: EVERY}[self.outlook(q, k)]


    def causal_from(self) -> int:
        return 0
