"""Which tokens go into which chunk of a scan: chunks cross no document, no run and hold no padding.

So a chunk needs no mask but the causal one, documents cannot touch each other (not even by a NaN),
and padding is the identity of a scan wherever it lies. Worked out on the host once for all layers
of a step (Span.plans).

Letters: B rows, T tokens, N chunks of a row, C slots of a chunk, R runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.span import PADDING, Span

# where a chunk's state comes from: the chunk before, nothing, or (r + 1) what was handed to run r
CONTINUE = -1
BLANK = 0

Runs = Sequence[Sequence[int]]  # for each row, how many tokens each of its runs has; together all T


@dataclass(frozen=True)
class ChunkLayout:
    """How B rows of T tokens lie in chunks.

    Attributes:
        size: C.
        slots: [B, N * C] int64, the token in each slot, or -1.
        places: [B, T] int64, the slot of each token, or -1 for padding.
        origins: [N][B] CONTINUE, BLANK, or r + 1.
        ends: [B, R] int64, the last chunk of every run.
        opened: [B, R] bool, does a document open in this run?
        plain: every token is in the slot of its own number.
    """

    size: int
    slots: Tensor
    places: Tensor
    origins: list[list[int]]
    ends: Tensor
    opened: Tensor
    plain: bool

    @property
    def count(self) -> int:
        """N."""
        return len(self.origins)

    def deal(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [B, N, H, C, ...]; 0 where there is no token."""
        taken = x if self.plain else _Pick.apply(x, self.slots, self.places)
        return taken.unflatten(1, (self.count, self.size)).transpose(2, 3)

    def collect(self, x: Tensor) -> Tensor:
        """[B, N, H, C, ...] -> [B, T, H, ...]; 0 at padding."""
        flat = x.transpose(2, 3).flatten(1, 2)
        return flat if self.plain else _Pick.apply(flat, self.places, self.slots)


def chunk_layout(span: Span, size: int, runs: Runs | None = None) -> ChunkLayout:
    """The chunks of at most `size` tokens (a power of two) of these rows.

    Args:
        at: addresses [B, T]; tokens of a run in order, a document opening where pos is 0.
        runs: tokens of each run of each row; a single run by default. Every row has equally many,
            some may be empty.
    """
    rows, tokens = span.shape
    lengths = tuple(map(tuple, runs)) if runs is not None else ((tokens,),) * rows
    key = ("chunks", size, lengths)
    if key not in span.plans:
        span.plans[key] = _build(span, size, lengths)
    return span.plans[key]


def on_host(span: Span) -> tuple[np.ndarray, np.ndarray]:
    """pos and doc [B, T]; on the meta device, where only shapes count, one document for each
    row."""
    if span.pos.is_meta:
        return np.tile(np.arange(span.shape[1]), (span.shape[0], 1)), np.zeros(
            span.shape, dtype=np.int64
        )
    return span.pos.cpu().numpy(), span.doc.cpu().numpy()


def _build(span: Span, size: int, lengths: tuple[tuple[int, ...], ...]) -> ChunkLayout:
    pos, doc = on_host(span)
    rows = [_row(p, d != PADDING, size, each) for p, d, each in zip(pos, doc, lengths, strict=True)]
    count = max(len(origins) for _, origins, _, _ in rows)
    slots = np.full((len(rows), count * size), -1)
    places = np.full(pos.shape, -1)
    for b, (place, _, _, _) in enumerate(rows):
        there = np.flatnonzero(place >= 0)
        slots[b, place[there]] = there
        places[b] = place
    origins = [[row[1][n] if n < len(row[1]) else CONTINUE for row in rows] for n in range(count)]
    plain = slots.shape == places.shape and bool((slots == np.arange(slots.shape[1])).all())
    device = span.pos.device
    return ChunkLayout(
        size,
        torch.from_numpy(slots).to(device),
        torch.from_numpy(places).to(device),
        origins,
        torch.tensor([row[2] for row in rows], device=device),
        torch.tensor([row[3] for row in rows], device=device),
        plain,
    )


def _row(
    pos: np.ndarray, valid: np.ndarray, size: int, lengths: tuple[int, ...]
) -> tuple[np.ndarray, list, list, list]:
    """(slot of every token, origin of every chunk, last chunk of every run, does a document open in
    the run)."""
    place = np.full(len(pos), -1)
    origins: list[int] = []
    ends = []
    opened = []
    start = 0
    for run, length in enumerate(lengths):
        there = start + np.flatnonzero(valid[start : start + length])
        starts = np.flatnonzero(pos[there] == 0)
        edges = [0, *starts[starts > 0].tolist(), len(there)]
        for a, b in zip(edges[:-1], edges[1:]):
            blank = len(starts) > 0 and a >= starts[0]
            place[there[a:b]] = len(origins) * size + np.arange(b - a)
            origins += [BLANK if blank else run + 1] + [CONTINUE] * (max(0, b - a - 1) // size)
        ends.append(len(origins) - 1)
        opened.append(len(starts) > 0)
        start += length
    return place, origins, ends, opened


class _Pick(torch.autograd.Function):
    """x [B, M, ...] at index [B, K], 0 where it is -1; no entry is picked twice, so backward picks
    by `back` [B, M]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _pick(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (back,) = ctx.saved_tensors
        return _pick(grad, back), None, None


def _pick(x: Tensor, index: Tensor) -> Tensor:
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    taken = (
        x.flatten(0, 1)
        .index_select(0, (index.clamp_min(0) + rows).flatten())
        .unflatten(0, index.shape)
    )
    return taken.masked_fill_((index < 0).view(*index.shape, *[1] * (x.dim() - 2)), 0)
