"""Visibility masks, an algebra over addresses: `Causal() & SameDocument() & SlidingWindow(4096)`.

A mask is evaluated three ways, which a test compares:

    dense      [B, H or 1, T, S] bool for any two Spans: the definition
    coverage   EMPTY, PARTIAL or FULL for two boxes of tokens: skips or unmasks whole blocks
    band       the visible range of pos_q - pos_k between two unbroken runs, for window kernels

A fourth property, `causal_from`, bounds the keys visible ahead of a query; next-token training
needs 0 of every layer.

Masks do not handle padding, which sees nothing and is never seen: `visible` removes it from the
whole. Masks are frozen dataclasses: hashable, without parameters, compared by value.

Letters: B rows, H heads, T queries, S keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.span import Span

# Coverage of a block: no query sees any key, some do, every query sees every key. The order
# matters: And takes the minimum of two coverages, Or the maximum, Not the difference to FULL.
EMPTY = 0
PARTIAL = 1
FULL = 2
FAR = 1 << 62  # larger than any distance between two tokens
PROBE = 512  # tokens on which a mask without its own `causal_from` is evaluated


class Bounds(NamedTuple):
    """Inclusive bounds of a set of tokens of one row.

    Attributes:
        run: the tokens are one document, with positions rising by one.
    """

    pos_low: int
    pos_high: int
    doc_low: int
    doc_high: int
    role_low: int
    role_high: int
    run: bool


# lowest and highest visible pos_q - pos_k; an empty band where the first exceeds the second
Band = tuple[int, int]
FULL_BAND: Band = (-FAR, FAR)
EMPTY_BAND: Band = (1, 0)


def distance(query: Span, key: Span) -> Tensor:
    """[B, 1, T, S] int64: pos_q - pos_k."""
    return (query.pos[:, :, None] - key.pos[:, None, :])[:, None]


def coverage_of(empty: bool, full: bool) -> int:
    """EMPTY, FULL, or PARTIAL where neither is certain."""
    if empty:
        return EMPTY
    return FULL if full else PARTIAL


def band_of(coverage: int) -> Band | None:
    """The band of a mask that shows whole blocks or none; None where coverage is PARTIAL."""
    if coverage == PARTIAL:
        return None
    return FULL_BAND if coverage == FULL else EMPTY_BAND


@dataclass(frozen=True)
class Mask:
    """Base of all masks; by itself everything sees everything."""

    def __init_subclass__(cls, **settings: object) -> None:
        """Resets `causal_from` in subclasses that override `dense` alone.

        A claim inherited from a parent that shows other keys would be wrong, and a wrong claim
        lets a model see its targets.
        """
        super().__init_subclass__(**settings)
        if "dense" in vars(cls) and "causal_from" not in vars(cls):
            cls.causal_from = Mask.causal_from  # type: ignore[method-assign]

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        """[B, H or 1, T, S] bool: True where a query may see a key.

        Args:
            heads: [H] int64, global head numbers; needed by masks that differ between heads.
        """
        rows, queries = query.shape
        shape = (rows, 1, queries, key.shape[1])
        return torch.ones(shape, dtype=torch.bool, device=query.pos.device)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        """EMPTY, PARTIAL or FULL; PARTIAL is always correct."""
        return FULL

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        """Visible range of pos_q - pos_k between two runs; None if it is not one range."""
        return FULL_BAND

    def causal_from(self) -> int:
        """A position from which on no key is seen by an earlier query; 0 = causal, FAR = unknown.

        It is about text that sees text of its own document. Tokens with other roles are left out:
        memory tokens lie before the tokens that read them, and PREFIX tokens are never targets.

        This default, for masks without a claim of their own, evaluates the dense mask of PROBE
        tokens.
        """
        line = Span.line(1, PROBE, "cpu")
        head = torch.zeros(1, dtype=torch.long, device="cpu")
        seen = self.dense(line, line, head)[0].any(0)
        positions = line.pos[0]
        later = positions[None, :] > positions[:, None]
        keys_seen_early = (seen & later).any(0).nonzero()
        if not len(keys_seen_early):
            return 0
        last = int(keys_seen_early[-1])
        # in the second half of the probe: it may well go on beyond it
        return FAR if last >= PROBE // 2 else last + 1

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclass(frozen=True)
class And(Mask):
    """A key is visible if both masks show it."""

    a: Mask
    b: Mask

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return self.a.dense(query, key, heads) & self.b.dense(query, key, heads)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return min(self.a.coverage(query, key), self.b.coverage(query, key))

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        first = self.a.band(query, key)
        second = self.b.band(query, key)
        if first is None or second is None:
            # one empty side decides, whatever the other is
            return EMPTY_BAND if EMPTY_BAND in (first, second) else None
        return max(first[0], second[0]), min(first[1], second[1])

    def causal_from(self) -> int:
        return min(self.a.causal_from(), self.b.causal_from())


@dataclass(frozen=True)
class Or(Mask):
    """A key is visible if at least one mask shows it."""

    a: Mask
    b: Mask

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return self.a.dense(query, key, heads) | self.b.dense(query, key, heads)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return max(self.a.coverage(query, key), self.b.coverage(query, key))

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        first = self.a.band(query, key)
        second = self.b.band(query, key)
        if first is None or second is None:
            # one full side decides, whatever the other is
            return FULL_BAND if FULL_BAND in (first, second) else None
        if first[0] > first[1]:
            return second
        if second[0] > second[1]:
            return first
        # two ranges with a gap between them are not a band
        if max(first[0], second[0]) > min(first[1], second[1]) + 1:
            return None
        return min(first[0], second[0]), max(first[1], second[1])

    def causal_from(self) -> int:
        return max(self.a.causal_from(), self.b.causal_from())


@dataclass(frozen=True)
class Not(Mask):
    """A key is visible if the mask hides it."""

    a: Mask

    def dense(self, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
        return ~self.a.dense(query, key, heads)

    def coverage(self, query: Bounds, key: Bounds) -> int:
        return FULL - self.a.coverage(query, key)

    def band(self, query: Bounds, key: Bounds) -> Band | None:
        band = self.a.band(query, key)
        if band == FULL_BAND:
            return EMPTY_BAND
        if band is not None and band[0] > band[1]:
            return FULL_BAND
        return None


def visible(mask: Mask, query: Span, key: Span, heads: Tensor | None = None) -> Tensor:
    """[B, H or 1, T, S] bool: where `mask` shows a key to a query and neither is padding."""
    seen = mask.dense(query, key, heads)
    return seen & query.valid()[:, None, :, None] & key.valid()[:, None, None, :]
