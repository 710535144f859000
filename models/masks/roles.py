"""Masks by role: prefix and global tokens, and memory tokens that read or write."""

from dataclasses import dataclass

from torch import Tensor

from models.masks.algebra import (
    FAR,
    Band,
    Bounds,
    Mask,
    band_of,
    coverage_of,
)
from models.span import GLOBAL, PREFIX, TEXT, Span


@dataclass(frozen=True)
class PrefixTokens(Mask):
    """Shows tokens of the role PREFIX, at any distance, and nothing else."""

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return (key.role == PREFIX)[:, None, None].expand(-1, 1, query.shape[1], -1)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        possible = key.role_low <= PREFIX <= key.role_high
        return coverage_of(not possible, key.role_low == key.role_high)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        # the claim is about text, which this mask never shows
        return 0


@dataclass(frozen=True)
class GlobalTokens(Mask):
    """Base of two masks of global tokens: by role, by the start of a document, or by period.

    Args:
        first: tokens at the start of each document that are global.
        every: each position divisible by this is global; 0 = none.
    """

    first: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        if self.first < 0 or self.every < 0:
            raise ValueError(
                f"first={self.first}, every={self.every}: numbers of tokens must be 0 or more"
            )

    def among(self, span: Span) -> Tensor:
        """[B, T] bool: True at global tokens."""
        is_global = (span.role == GLOBAL) | (span.pos < self.first)
        if self.every:
            is_global = is_global | (span.pos % self.every == 0)
        return is_global

    def certainty(self, box: Bounds) -> int:
        """EMPTY, PARTIAL or FULL: none, some or all tokens of a box are global."""
        by_role = box.role_low == box.role_high == GLOBAL
        full = by_role or box.pos_high < self.first or self.every == 1
        has_first = box.pos_low < self.first
        has_multiple = bool(self.every) and box.pos_high // self.every * self.every >= box.pos_low
        has_role = box.role_low <= GLOBAL <= box.role_high
        empty = not (full or has_first or has_multiple or has_role)
        return coverage_of(empty, full)


@dataclass(frozen=True)
class GlobalKey(GlobalTokens):
    """Shows global keys to every query."""

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return self.among(key)[:, None, None, :].expand(-1, 1, query.shape[1], -1)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return self.certainty(key)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.certainty(key))

    def causal_from(self) -> int:
        if self.every:
            return FAR
        # the very first token is never later than its query
        return self.first if self.first > 1 else 0


@dataclass(frozen=True)
class GlobalQuery(GlobalTokens):
    """Shows every key to global queries."""

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return self.among(query)[:, None, :, None].expand(-1, 1, -1, key.shape[1])

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return self.certainty(query)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.certainty(query))

    def causal_from(self) -> int:
        return FAR if self.first or self.every else 0


@dataclass(frozen=True)
class RoleKey(Mask):
    """Shows keys of one role to every query."""

    role: int

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return (key.role == self.role)[:, None, None, :].expand(-1, 1, query.shape[1], -1)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        possible = key.role_low <= self.role <= key.role_high
        return coverage_of(not possible, key.role_low == key.role_high)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        return FAR if self.role == TEXT else 0


@dataclass(frozen=True)
class RoleQuery(Mask):
    """Shows every key to queries of one role."""

    role: int

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return (query.role == self.role)[:, None, :, None].expand(-1, 1, -1, key.shape[1])

    def coverage(self, query: Bounds, key: Bounds) -> int:
        possible = query.role_low <= self.role <= query.role_high
        return coverage_of(not possible, query.role_low == query.role_high)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        return FAR if self.role == TEXT else 0
