"""Masks every model uses: causality, documents, windows, first tokens and chunks."""

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
    _distance,
)
from models.span import Span


@dataclass(frozen=True)
class Causal(Mask):
    """Itself and what stands before it; a later token of the same document is unseen."""

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return _distance(q, k) >= 0

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return _coverage(q.pos_high < k.pos_low, q.pos_low >= k.pos_high)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return 0, FAR

    def causal_from(self) -> int:
        return 0


@dataclass(frozen=True)
class SameDocument(Mask):
    """Only tokens of the query's own document."""

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (q.doc[:, :, None] == k.doc[:, None, :])[:, None]

    def coverage(self, q: Bounds, k: Bounds) -> int:
        apart = q.doc_high < k.doc_low or k.doc_high < q.doc_low
        return _coverage(apart, q.doc_low == q.doc_high == k.doc_low == k.doc_high)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return FULL_BAND if q.doc_low == k.doc_low else EMPTY_BAND

    def causal_from(self) -> int:
        return FAR


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """The last `reach` tokens, the query itself among them, and everything later."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window is a number of tokens and counts the query itself; got {self.window}, want"
                " 1 or more"
            )

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return _distance(q, k) < self.window

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return _coverage(
            q.pos_low - k.pos_high >= self.window, q.pos_high - k.pos_low < self.window
        )

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return -FAR, self.window - 1

    def causal_from(self) -> int:
        return FAR


@dataclass(frozen=True)
class FirstTokens(Mask):
    """The first `count` tokens of a document, seen from anywhere in it; nothing else."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"a document cannot begin with {self.count} tokens; want 0 or more")

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (k.pos < self.count)[:, None, None].expand(-1, 1, q.shape[1], -1)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return _coverage(k.pos_low >= self.count, k.pos_high < self.count)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return {EMPTY: EMPTY_BAND, PARTIAL: None, FULL: FULL_BAND}[self.coverage(q, k)]

    def causal_from(self) -> int:
        return self.count if self.count > 1 else 0  # the very first token is ahead of none


@dataclass(frozen=True)
class SameChunk(Mask):
    """Tokens of the query's own chunk: documents are counted off into chunks of `size` tokens."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a chunk is a number of tokens; got {self.size}, want 1 or more")

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return (q.pos[:, :, None] // self.size == k.pos[:, None, :] // self.size)[:, None]

    def coverage(self, q: Bounds, k: Bounds) -> int:
        q_low, q_high, k_low, k_high = (
            pos // self.size for pos in (q.pos_low, q.pos_high, k.pos_low, k.pos_high)
        )
        return _coverage(q_high < k_low or k_high < q_low, q_low == q_high == k_low == k_high)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        return {EMPTY: EMPTY_BAND, PARTIAL: None, FULL: FULL_BAND}[self.coverage(q, k)]

    def causal_from(self) -> int:
        return FAR if self.size > 1 else 0
