"""Which tokens make up which piece of a segmented memory, and in which order pieces may be gone
through at once.

A piece is what one run holds of one segment of one document. What it does to a memory adds up over
its tokens, so the sizes of
pieces do not matter: their tokens lie in chunks, and the sums of the chunks of a piece are its own.
Pieces of a document that follow one another in a run form a chain, along which a memory passes; the
d-th pieces of all chains are done together. Worked out on the host once for all layers of a step
(Span.plans).

Letters: B rows, T tokens, N chunks of all rows, C slots of a chunk, P pieces, Q chains, R runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.scan_chunks import Runs, on_host
from models.span import PADDING, Span

CHUNK = 128  # tokens to a chunk, a power of two; shorter where every piece is


@dataclass(frozen=True)
class SegmentChunks:
    """How B rows of T tokens lie in chunks, chunks in pieces and pieces in chains.

    Pieces are numbered by their place in their chain, then by chain; chains from the longest to the
    shortest.

    Attributes: size: C. slots: [N * C] int64, the token (of all rows end to end) in each slot, or B
        * T for none. places: [B * T] int64, the slot of each token, or N * C for padding. piece:
        [N] int64, the piece of every chunk. begins: [P] bool, does a segment begin here? widths:
        how many chains have a d-th piece, for every d. source: [Q] int64, row * R + run of the
        state that the chain starts from, or B * R where it starts from nothing. last: [B, R] int64,
        the chain at the end of every run. opened, began: [B, R] bool, does a document open in this
        run, and does a segment begin in the run's first chain?
    """

    size: int
    slots: Tensor
    places: Tensor
    piece: Tensor
    begins: Tensor
    widths: list[int]
    source: Tensor
    last: Tensor
    opened: Tensor
    began: Tensor

    def deal(self, x: Tensor) -> Tensor:
        """[B, T, H, ...] -> [N, H, C, ...]; 0 where there is no token."""
        return _picked(x.flatten(0, 1), self.slots).unflatten(0, (-1, self.size)).transpose(1, 2)

    def collect(self, x: Tensor, rows: int) -> Tensor:
        """[N, H, C, ...] -> [B, T, H, ...]; 0 at padding."""
        return _picked(x.transpose(1, 2).flatten(0, 1), self.places).unflatten(0, (rows, -1))

    def sums(self, x: Tensor) -> Tensor:
        """[N, ...] -> [P, ...]: over the chunks of every piece."""
        return x.new_zeros(len(self.begins), *x.shape[1:]).index_add(0, self.piece, x)

    def steps(self) -> Iterator[tuple[int, int]]:
        """(first piece, the one after the last) of every place in the chains."""
        first = 0
        for width in self.widths:
            yield first, first + width
            first += width


def segment_chunks(span: Span, segment: int | None, runs: Runs | None = None) -> SegmentChunks:
    """The pieces of these rows.

    Args:
        at: addresses [B, T]; tokens of a run in order, a document opening where pos is 0.
        segment: tokens of a document to a segment; None: none begins inside these rows.
        runs: tokens of each run of each row; a single run by default. Every row has equally many,
            some may be empty.
    """
    rows, tokens = span.shape
    lengths = tuple(map(tuple, runs)) if runs is not None else ((tokens,),) * rows
    key = ("pieces", segment, lengths)
    if key not in span.plans:
        span.plans[key] = _build(span, segment, lengths)
    return span.plans[key]


class _ChunkChain(NamedTuple):
    source: int
    pieces: list[tuple[np.ndarray, bool]]  # tokens, does a segment begin


def _build(span: Span, segment: int | None, lengths: tuple[tuple[int, ...], ...]) -> SegmentChunks:
    pos, doc = on_host(span)
    rows, tokens = pos.shape
    runs = len(lengths[0])
    chains: list[_ChunkChain] = []
    last, opened, began = (np.zeros((rows, runs), dtype=kind) for kind in (np.int64, bool, bool))
    for row in range(rows):
        start = 0
        for run, length in enumerate(lengths[row]):
            there = start + np.flatnonzero(doc[row, start : start + length] != PADDING)
            fresh = _chains(pos[row], there, segment, row * runs + run, rows * runs)
            opened[row, run] = len(fresh) > 1
            began[row, run] = any(begins for _, begins in fresh[0].pieces)
            chains += [
                _ChunkChain(chain.source, [(row * tokens + t, b) for t, b in chain.pieces])
                for chain in fresh
            ]
            last[row, run] = len(chains) - 1
            start += length
    order = sorted(range(len(chains)), key=lambda c: -len(chains[c].pieces))
    chains = [chains[c] for c in order]
    widths = [sum(len(chain.pieces) > d for chain in chains) for d in range(len(chains[0].pieces))]
    found = [chains[c].pieces[d] for d, width in enumerate(widths) for c in range(width)]
    size, slots, piece = _slots([t for t, _ in found], rows * tokens)
    places = np.full(rows * tokens + 1, len(slots))
    places[slots] = np.arange(len(slots))
    arrays = (
        slots,
        places[:-1],
        piece,
        np.array([begins for _, begins in found], dtype=bool),
        np.array([chain.source for chain in chains]),
        np.argsort(order)[last],
        opened,
        began,
    )
    slots, places, piece, begins, source, last, opened, began = (
        torch.from_numpy(x).to(span.pos.device) for x in arrays
    )
    return SegmentChunks(size, slots, places, piece, begins, widths, source, last, opened, began)


def _chains(
    pos: np.ndarray, there: np.ndarray, segment: int | None, source: int, nothing: int
) -> list[_ChunkChain]:
    """The chains of one run, whose tokens are `there`; the first goes on with what comes into the
    run, and may be empty."""
    starts = pos[there] == 0
    borders = starts if segment is None else pos[there] % segment == 0
    edges = [0, *(1 + np.flatnonzero(borders[1:])).tolist(), len(there)] if len(there) else [0]
    chains = [_ChunkChain(source, [])]
    for a, b in zip(edges[:-1], edges[1:]):
        if starts[a]:
            chains.append(_ChunkChain(nothing, []))
        chains[-1].pieces.append((there[a:b], bool(borders[a]) and not starts[a]))
    return chains


def _slots(found: list[np.ndarray], nothing: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(C, [N * C] the token in every slot, [N] the piece of every chunk)."""
    longest = max((len(tokens) for tokens in found), default=1)
    size = min(CHUNK, 1 << (longest - 1).bit_length())
    counts = [-(-len(tokens) // size) for tokens in found]
    slots = np.full(sum(counts) * size, nothing)
    begin = 0
    for tokens, count in zip(found, counts):
        slots[begin : begin + len(tokens)] = tokens
        begin += count * size
    return size, slots, np.repeat(np.arange(len(found)), counts)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """x [M, ...] at index [K], 0 where it is M."""
    return F.pad(x, [0, 0] * (x.dim() - 1) + [0, 1]).index_select(0, index)
