"""Assigns tokens to the chunks of a scan: chunks cross no document and no run, and hold no padding.

So a chunk needs only the causal mask, documents cannot touch each other (not even by a NaN), and
padding is the identity of a scan wherever it lies. Computed on the host once for all layers of a
step (Span.cache).

Letters: B rows, T tokens, N chunks of a row, C slots of a chunk, R runs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.plans import planned
from models.span import PADDING, Span, to_device

# Source of a chunk's state: the chunk before, an empty state, or (r + 1) the state given to run r.
CONTINUE = -1
BLANK = 0

# For each row, the number of tokens of each of its runs; they sum to T.
Runs = Sequence[Sequence[int]]


@dataclass(frozen=True)
class ChunkLayout:
    """Positions of B rows of T tokens in chunks.

    Attributes:
        size: C.
        slots: [B, N * C] int64, the token in each slot, or -1.
        places: [B, T] int64, the slot of each token, or -1 for padding.
        origins: [N][B] CONTINUE, BLANK, or r + 1.
        ends: [B, R] int64, the last chunk of every run.
        opened: [B, R] bool, whether a document opens in this run.
        plain: whether every token is in the slot of its own number.
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
        """Moves tokens into chunks, [B, T, H, ...] -> [B, N, H, C, ...]; empty slots are 0."""
        if not self.plain:
            x = _Pick.apply(x, self.slots, self.places)
        return x.unflatten(1, (self.count, self.size)).transpose(2, 3)

    def collect(self, x: Tensor) -> Tensor:
        """Moves chunks back to tokens, [B, N, H, C, ...] -> [B, T, H, ...]; 0 at padding."""
        flat = x.transpose(2, 3).flatten(1, 2)
        if self.plain:
            return flat
        return _Pick.apply(flat, self.places, self.slots)


@planned
def chunk_layout(span: Span, size: int, runs: Runs | None = None) -> ChunkLayout:
    """Returns the chunks of at most `size` tokens (a power of two) of these rows.

    Args:
        span: addresses [B, T]; tokens of a run in order, a document opening where pos is 0.
        runs: tokens of each run of each row; a single run by default. Every row has the same number
            of runs; a run may be empty.
    """
    lengths = run_lengths(span, runs)
    return span.cache.get(("chunks", size, lengths), lambda: _build(span, size, lengths))


def run_lengths(span: Span, runs: Runs | None) -> tuple[tuple[int, ...], ...]:
    """Returns the tokens of each run of each row; by default a row is a single run."""
    rows, tokens = span.shape
    if runs is None:
        return ((tokens,),) * rows
    return tuple(tuple(lengths) for lengths in runs)


def on_host(span: Span) -> tuple[np.ndarray, np.ndarray]:
    """Returns pos and doc [B, T] as arrays.

    On the meta device, where only shapes count, every row is one document.
    """
    if span.pos.is_meta:
        pos = np.tile(np.arange(span.shape[1]), (span.shape[0], 1))
        return pos, np.zeros(span.shape, dtype=np.int64)
    host = span.host()
    return host.pos.numpy(), host.doc.numpy()


class _RowChunks(NamedTuple):
    """Chunks of one row: slot of every token, origin of every chunk, and for each run its last
    chunk and whether a document opens in it."""

    places: np.ndarray
    origins: list[int]
    ends: list[int]
    opened: list[bool]


def _build(span: Span, size: int, lengths: tuple[tuple[int, ...], ...]) -> ChunkLayout:
    pos, doc = on_host(span)
    rows = []
    for row_pos, row_doc, row_lengths in zip(pos, doc, lengths, strict=True):
        rows.append(_row(row_pos, row_doc != PADDING, size, row_lengths))
    count = max(len(row.origins) for row in rows)
    slots = np.full((len(rows), count * size), -1)
    places = np.full(pos.shape, -1)
    for row_index, row in enumerate(rows):
        tokens = np.flatnonzero(row.places >= 0)
        slots[row_index, row.places[tokens]] = tokens
        places[row_index] = row.places
    origins = []
    for number in range(count):
        # A row with fewer chunks ends in empty ones, which leave its state alone.
        chunk_origins = []
        for row in rows:
            has_chunk = number < len(row.origins)
            chunk_origins.append(row.origins[number] if has_chunk else CONTINUE)
        origins.append(chunk_origins)
    plain = slots.shape == places.shape and bool((slots == np.arange(slots.shape[1])).all())
    device = span.pos.device
    return ChunkLayout(
        size,
        to_device(slots, device),
        to_device(places, device),
        origins,
        to_device([row.ends for row in rows], device),
        to_device([row.opened for row in rows], device),
        plain,
    )


def _row(pos: np.ndarray, valid: np.ndarray, size: int, lengths: tuple[int, ...]) -> _RowChunks:
    """Assigns the valid tokens of one row to chunks."""
    places = np.full(len(pos), -1)
    origins: list[int] = []
    ends = []
    opened = []
    run_start = 0
    for run, length in enumerate(lengths):
        tokens = run_start + np.flatnonzero(valid[run_start : run_start + length])
        begins = np.flatnonzero(pos[tokens] == 0)
        edges = [0, *begins[begins > 0].tolist(), len(tokens)]
        for start, stop in zip(edges[:-1], edges[1:]):
            blank = len(begins) > 0 and start >= begins[0]
            places[tokens[start:stop]] = len(origins) * size + np.arange(stop - start)
            origins.append(BLANK if blank else run + 1)
            further_chunks = max(0, stop - start - 1) // size
            origins += [CONTINUE] * further_chunks
        ends.append(len(origins) - 1)
        opened.append(len(begins) > 0)
        run_start += length
    return _RowChunks(places, origins, ends, opened)


class _Pick(torch.autograd.Function):
    """x [B, M, ...] at index [B, K], 0 where it is -1.

    No entry is picked twice, so backward picks by the inverse index `back` [B, M]: a scatter would
    be slower, and not deterministic on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _pick(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        (back,) = ctx.saved_tensors
        return _pick(grad, back), None, None


def _pick(x: Tensor, index: Tensor) -> Tensor:
    row_starts = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    flat_index = (index.clamp_min(0) + row_starts).flatten()
    picked = x.flatten(0, 1).index_select(0, flat_index).unflatten(0, index.shape)
    empty = (index < 0).view(*index.shape, *[1] * (x.dim() - 2))
    return picked.masked_fill_(empty, 0)
