"""Masks by role: prefix and global tokens, and memory tokens that read or write."""

from dataclasses import dataclass

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
    _coverage,
)
from models.span import GLOBAL, PREFIX, TEXT, Span


@dataclass(frozen=True)
class PrefixTokens(Mask):
    """Tokens whose role is PREFIX, seen from anywhere in their document; nothing else."""

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (k.role == PREFIX)[:, None, None].expand(-1, 1, q.shape[1], -1)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return _coverage(
            not k.role_low <= PREFIX <= k.role_high, k.role_low == k.role_high == PREFIX
        )

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return {EMPTY: EMPTY_BAND, PARTIAL: None, FULL: FULL_BAND}[self.coverage(q, k)]

    def causal_from(self) -> int:
        return 0  # text is no prefix


@dataclass(frozen=True)
class GlobalTokens(Mask):
    """The parent of two masks that name global tokens: role GLOBAL, the first of a document, or
    every so many.

    Args:
        first: tokens at the start of each document that are global.
        every: each position that this divides is global; 0 = none.
    """

    first: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.every < 0:
            raise ValueError(
                f"global tokens: first={self.first} and every={self.every} are numbers of tokens, 0"
                " or more"
            )

    def among(self, span: Span) -> Tensor:
        """[B, T] bool: which tokens are global."""
        found = (span.role == GLOBAL) | (span.pos < self.first)
        return found | (span.pos % self.every == 0) if self.every else found

    def certainty(self, box: Bounds) -> int:
        """NONE, SOME or ALL of the tokens of a box are global."""
        if box.role_low == box.role_high == GLOBAL or box.pos_high < self.first or self.every == 1:
            return FULL
        multiple = bool(self.every) and box.pos_high // self.every * self.every >= box.pos_low
        return (
            PARTIAL
            if multiple or box.pos_low < self.first or box.role_low <= GLOBAL <= box.role_high
            else EMPTY
        )


@dataclass(frozen=True)
class GlobalKey(GlobalTokens):
    """The key is a global token."""

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return self.among(k)[:, None, None, :].expand(-1, 1, q.shape[1], -1)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return self.certainty(k)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return (EMPTY_BAND, None, FULL_BAND)[self.certainty(k)]

    def causal_from(self) -> int:
        if self.every:
            return FAR
        return self.first if self.first > 1 else 0


@dataclass(frozen=True)
class GlobalQuery(GlobalTokens):
    """The query is a global token."""

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return self.among(q)[:, None, :, None].expand(-1, 1, -1, k.shape[1])

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return self.certainty(q)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return (EMPTY_BAND, None, FULL_BAND)[self.certainty(q)]

    def causal_from(self) -> int:
        return FAR if self.first or self.every else 0


@dataclass(frozen=True)
class RoleKey(Mask):
    """The key has this role."""

    role: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (k.role == self.role)[:, None, None, :].expand(-1, 1, q.shape[1], -1)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        if k.role_low == k.role_high:
            return FULL if k.role_low == self.role else EMPTY
        return PARTIAL if k.role_low <= self.role <= k.role_high else EMPTY

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return (EMPTY_BAND, None, FULL_BAND)[self.coverage(q, k)]

    def causal_from(self) -> int:
        return FAR if self.role == TEXT else 0


@dataclass(frozen=True)
class RoleQuery(Mask):
    """The query has this role."""

    role: int

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (q.role == self.role)[:, None, :, None].expand(-1, 1, -1, k.shape[1])

    def coverage(self, q: Bounds, k: Bounds) -> int:
        if q.role_low == q.role_high:
            return FULL if q.role_low == self.role else EMPTY
        return PARTIAL if q.role_low <= self.role <= q.role_high else EMPTY

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return (EMPTY_BAND, None, FULL_BAND)[self.coverage(q, k)]

    def causal_from(self) -> int:
        return FAR if self.role == TEXT else 0
