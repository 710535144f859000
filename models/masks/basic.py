"""The basic masks: causality, documents, windows, first tokens and chunks."""

from dataclasses import dataclass

from torch import Tensor

from models.masks.algebra import (
    EMPTY_BAND,
    FAR,
    FULL_BAND,
    Band,
    Bounds,
    Mask,
    band_of,
    coverage_of,
    distance,
)
from models.span import Span


@dataclass(frozen=True)
class Causal(Mask):
    """Shows a query itself and earlier positions."""

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return distance(query, key) >= 0

    def coverage(self, query: Bounds, key: Bounds) -> int:
        all_later = query.pos_high < key.pos_low
        all_earlier = query.pos_low >= key.pos_high
        return coverage_of(all_later, all_earlier)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return 0, FAR

    def causal_from(self) -> int:
        return 0


@dataclass(frozen=True)
class SameDocument(Mask):
    """Shows tokens of the query's own document."""

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        same_document = query.doc[:, :, None] == key.doc[:, None, :]
        return same_document[:, None]

    def coverage(self, query: Bounds, key: Bounds) -> int:
        disjoint = query.doc_high < key.doc_low or key.doc_high < query.doc_low
        same = query.doc_low == query.doc_high == key.doc_low == key.doc_high
        return coverage_of(disjoint, same)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        # a run is one document, so its lowest number is its only one
        return FULL_BAND if query.doc_low == key.doc_low else EMPTY_BAND

    def causal_from(self) -> int:
        return FAR


@dataclass(frozen=True)
class SlidingWindow(Mask):
    """Shows the last `window` tokens, the query itself among them, and all later tokens."""

    window: int

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(
                f"window is a number of tokens and counts the query itself; got {self.window}, want"
                " 1 or more"
            )

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return distance(query, key) < self.window

    def coverage(self, query: Bounds, key: Bounds) -> int:
        nearest = query.pos_low - key.pos_high
        furthest = query.pos_high - key.pos_low
        return coverage_of(nearest >= self.window, furthest < self.window)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return -FAR, self.window - 1

    def causal_from(self) -> int:
        # a window limits the past only; later tokens are hidden by Causal
        return FAR


@dataclass(frozen=True)
class FirstTokens(Mask):
    """Shows the first `count` tokens of a document, at any distance, and nothing else."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError(f"count={self.count}: a number of tokens; want 0 or more")

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return (key.pos < self.count)[:, None, None].expand(-1, 1, query.shape[1], -1)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return coverage_of(key.pos_low >= self.count, key.pos_high < self.count)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        # the very first token is never later than its query
        return self.count if self.count > 1 else 0


@dataclass(frozen=True)
class SameChunk(Mask):
    """Shows tokens of the query's own chunk of `size` tokens, counted from the document's start."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a chunk is a number of tokens; got {self.size}, want 1 or more")

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        query_chunk = query.pos // self.size
        key_chunk = key.pos // self.size
        return (query_chunk[:, :, None] == key_chunk[:, None, :])[:, None]

    def coverage(self, query: Bounds, key: Bounds) -> int:
        query_low = query.pos_low // self.size
        query_high = query.pos_high // self.size
        key_low = key.pos_low // self.size
        key_high = key.pos_high // self.size
        disjoint = query_high < key_low or key_high < query_low
        return coverage_of(disjoint, query_low == query_high == key_low == key_high)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        return band_of(self.coverage(query, key))

    def causal_from(self) -> int:
        return FAR if self.size > 1 else 0
