"""Which key a query may see, as an algebra over addresses: `Causal() & SameDocument() & Reach(4096)
| First(4)`.

A mask is evaluated three ways, which a test holds equal:

    dense    [B, H or 1, T, S] bool for any two Spans: the truth
    outlook  NONE, SOME or ALL for two boxes of tokens: lets whole blocks be skipped, or computed without a mask
    band     the visible range of pos_q - pos_k between two unbroken runs: what causal and window kernels take

A fourth property, `causal_from`, bounds what may be seen ahead of a query; a loss of the next token
needs 0 of every layer.

Padding is no mask's business: nothing sees it and it sees nothing (`dense` of the whole is cut by
validity in `visible`).
Masks are frozen dataclasses: hashable, without parameters, compared by value.

Letters: B rows, H heads, T queries, S keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.span import Span

# outlooks: no key is visible to any query, it depends, every key to every query
EMPTY = 0
PARTIAL = 1
FULL = 2
FAR = 1 << 62  # further than any two tokens are apart
PROBE = 512  # tokens on which a mask that does not state `causal_from` is tried out


class Bounds(NamedTuple):
    """Bounds of a set of tokens of one row; all inclusive. `run`: one document, positions rising by
    one."""

    pos_low: int
    pos_high: int
    doc_low: int
    doc_high: int
    role_low: int
    role_high: int
    run: bool


Band = tuple[
    int, int
]  # lowest and highest visible pos_q - pos_k; empty where the first exceeds the second
FULL_BAND: Band = (-FAR, FAR)
EMPTY_BAND: Band = (1, 0)


def _distance(q: Span, k: Span) -> Tensor:
    """[B, 1, T, S] int64: pos_q - pos_k."""
    return (q.pos[:, :, None] - k.pos[:, None, :])[:, None]


def _coverage(no: bool, yes: bool) -> int:
    return EMPTY if no else FULL if yes else PARTIAL


@dataclass(frozen=True)
class Mask:
    """Everything sees everything; the parent of all masks."""

    def __init_subclass__(cls, **settings: object) -> None:
        """A mask that shows other keys than its parent inherits no claim about them: it is tried
        out."""
        super().__init_subclass__(**settings)
        if "dense" in vars(cls) and "causal_from" not in vars(cls):
            cls.causal_from = Mask.causal_from  # type: ignore[method-assign]

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        """[B, H or 1, T, S] bool: may this query see this key? `heads` [H] int64 are global head
        numbers."""
        return torch.ones(
            q.shape[0], 1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.pos.device
        )

    def coverage(self, q: Bounds, k: Bounds) -> int:
        """NONE, SOME or ALL; SOME is always safe."""
        return FULL

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        """Visible range of pos_q - pos_k between two runs, or None where that is no band."""
        return FULL_BAND

    def causal_from(self) -> int:
        """A position such that no key at it or behind it is seen by an earlier query; 0 = causal,
        FAR = none is known.

        Speaks of text that sees text of its own document. Tokens with other roles are left out:
        what a memory adds lies before those that read it, and tokens of the role PREFIX are targets
        of no loss.

        This default, for masks that state nothing themselves, looks at the dense mask of PROBE
        tokens.
        """
        line = Span.line(1, PROBE, "cpu")
        seen = self.dense(line, line, torch.zeros(1, dtype=torch.long, device="cpu"))[0].any(0)
        ahead = (seen & (line.pos[0][None, :] > line.pos[0][:, None])).any(0).nonzero()
        if not len(ahead):
            return 0
        last = int(ahead[-1])
        return FAR if last >= PROBE // 2 else last + 1

    def __and__(self, other: "Mask") -> "Mask":
        return And(self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return Or(self, other)

    def __invert__(self) -> "Mask":
        return Not(self)


@dataclass(frozen=True)
class And(Mask):
    """Seen by both of two masks."""

    a: Mask
    b: Mask

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return self.a.dense(q, k, heads) & self.b.dense(q, k, heads)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return min(self.a.coverage(q, k), self.b.coverage(q, k))

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        a = self.a.band(q, k)
        b = self.b.band(q, k)
        if a is None or b is None:
            return EMPTY_BAND if EMPTY_BAND in (a, b) else None
        return max(a[0], b[0]), min(a[1], b[1])

    def causal_from(self) -> int:
        return min(self.a.causal_from(), self.b.causal_from())


@dataclass(frozen=True)
class Or(Mask):
    """Seen by at least one of two masks."""

    a: Mask
    b: Mask

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return self.a.dense(q, k, heads) | self.b.dense(q, k, heads)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return max(self.a.coverage(q, k), self.b.coverage(q, k))

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        a = self.a.band(q, k)
        b = self.b.band(q, k)
        if a is None or b is None:
            return FULL_BAND if FULL_BAND in (a, b) else None
        if a[0] > a[1] or b[0] > b[1]:
            return b if a[0] > a[1] else a
        touch = max(a[0], b[0]) <= min(a[1], b[1]) + 1  # their union is one band
        return (min(a[0], b[0]), max(a[1], b[1])) if touch else None

    def causal_from(self) -> int:
        return max(self.a.causal_from(), self.b.causal_from())


@dataclass(frozen=True)
class Not(Mask):
    """Seen where another mask does not see."""

    a: Mask

    def dense(self, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
        return ~self.a.dense(q, k, heads)

    def coverage(self, q: Bounds, k: Bounds) -> int:
        return FULL - self.a.coverage(q, k)

    def band(self, q: Bounds, k: Bounds) -> Band | None:
        band = self.a.band(q, k)
        return (
            EMPTY_BAND
            if band == FULL_BAND
            else FULL_BAND
            if band is not None and band[0] > band[1]
            else None
        )


def visible(mask: Mask, q: Span, k: Span, heads: Tensor | None = None) -> Tensor:
    """[B, H or 1, T, S] bool: what `mask` allows among tokens that are no padding."""
    return mask.dense(q, k, heads) & q.valid()[:, None, :, None] & k.valid()[:, None, None, :]
