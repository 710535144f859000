"""Assigns tokens to the pieces of a segmented memory, and orders the pieces.

A piece is the part of one segment of one document that lies in one run. Its effect on a memory adds
up over its tokens, so pieces may have any size: their tokens lie in chunks, and the sum over the
chunks of a piece is its own. Consecutive pieces of a document in a run form a chain, along which a
memory passes; the d-th pieces of all chains are computed together. Computed on the host once for
all layers of a step (Span.cache).

Letters: B rows, T tokens, N chunks of all rows, C slots of a chunk, P pieces, Q chains, R runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from models.kernels.scan_chunks import Runs, on_host, run_lengths
from models.plans import planned
from models.span import PADDING, Span, to_device

CHUNK = 128  # tokens to a chunk, a power of two; shorter where every piece is


@dataclass(frozen=True)
class SegmentChunks:
    """Positions of B rows of T tokens in chunks, of chunks in pieces, and of pieces in chains.

    Pieces are numbered by their place in their chain, then by chain; chains from the longest to the
    shortest.

    Attributes:
        size: C.
        slots: [N * C] int64, the token (of all rows end to end) in each slot, or B * T for an empty
            slot.
        places: [B * T] int64, the slot of each token, or N * C for padding.
        piece: [N] int64, the piece of every chunk.
        begins: [P] bool, whether a segment begins with the piece.
        widths: number of chains that have a d-th piece, for every d.
        source: [Q] int64, row * R + run of the state that the chain starts from, or B * R where it
            starts from an empty one.
        last: [B, R] int64, the chain at the end of every run.
        opened: [B, R] bool, whether a document opens in this run.
        began: [B, R] bool, whether a segment begins in the run's first chain.
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
        """Moves tokens into chunks, [B, T, H, ...] -> [N, H, C, ...]; empty slots are 0."""
        picked = _picked(x.flatten(0, 1), self.slots)
        return picked.unflatten(0, (-1, self.size)).transpose(1, 2)

    def collect(self, x: Tensor, rows: int) -> Tensor:
        """Moves chunks back to tokens, [N, H, C, ...] -> [B, T, H, ...]; 0 at padding."""
        picked = _picked(x.transpose(1, 2).flatten(0, 1), self.places)
        return picked.unflatten(0, (rows, -1))

    def sums(self, x: Tensor) -> Tensor:
        """Sums over the chunks of every piece, [N, ...] -> [P, ...]."""
        return x.new_zeros(len(self.begins), *x.shape[1:]).index_add(0, self.piece, x)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Yields (first piece, the one after the last) of every place in the chains."""
        first = 0
        for width in self.widths:
            yield first, first + width
            first += width


@planned
def segment_chunks(span: Span, segment: int | None, runs: Runs | None = None) -> SegmentChunks:
    """Returns the pieces of these rows.

    Args:
        span: addresses [B, T]; tokens of a run in order, a document opening where pos is 0.
        segment: tokens of a document in a segment; None: no segment begins inside these rows.
        runs: tokens of each run of each row; a single run by default. Every row has the same number
            of runs; a run may be empty.
    """
    lengths = run_lengths(span, runs)
    return span.cache.get(("pieces", segment, lengths), lambda: _build(span, segment, lengths))


class _ChunkChain(NamedTuple):
    source: int
    pieces: list[tuple[np.ndarray, bool]]  # (tokens, whether a segment begins)


def _build(span: Span, segment: int | None, lengths: tuple[tuple[int, ...], ...]) -> SegmentChunks:
    pos, doc = on_host(span)
    rows, tokens = pos.shape
    runs = len(lengths[0])
    chains: list[_ChunkChain] = []
    last = np.zeros((rows, runs), dtype=np.int64)
    opened = np.zeros((rows, runs), dtype=bool)
    began = np.zeros((rows, runs), dtype=bool)
    for row in range(rows):
        run_start = 0
        for run, length in enumerate(lengths[row]):
            is_valid = doc[row, run_start : run_start + length] != PADDING
            valid = run_start + np.flatnonzero(is_valid)
            run_chains = _chains(pos[row], valid, segment, row * runs + run, rows * runs)
            opened[row, run] = len(run_chains) > 1
            began[row, run] = any(begins for _, begins in run_chains[0].pieces)
            for chain in run_chains:
                pieces = [(row * tokens + piece, begins) for piece, begins in chain.pieces]
                chains.append(_ChunkChain(chain.source, pieces))
            last[row, run] = len(chains) - 1
            run_start += length
    # From the longest to the shortest: the chains that still run are always the first ones.
    order = sorted(range(len(chains)), key=lambda chain: -len(chains[chain].pieces))
    chains = [chains[chain] for chain in order]
    widths = []
    pieces = []
    for depth in range(len(chains[0].pieces)):
        width = sum(len(chain.pieces) > depth for chain in chains)
        widths.append(width)
        pieces += [chain.pieces[depth] for chain in chains[:width]]
    size, slots, piece = _slots([piece_tokens for piece_tokens, _ in pieces], rows * tokens)
    places = np.full(rows * tokens + 1, len(slots))
    places[slots] = np.arange(len(slots))

    def on_device(array: np.ndarray) -> Tensor:
        return to_device(array, span.pos.device)

    return SegmentChunks(
        size=size,
        slots=on_device(slots),
        places=on_device(places[:-1]),
        piece=on_device(piece),
        begins=on_device(np.array([begins for _, begins in pieces], dtype=bool)),
        widths=widths,
        source=on_device(np.array([chain.source for chain in chains])),
        last=on_device(np.argsort(order)[last]),
        opened=on_device(opened),
        began=on_device(began),
    )


def _chains(
    pos: np.ndarray, valid: np.ndarray, segment: int | None, source: int, nothing: int
) -> list[_ChunkChain]:
    """Returns the chains of one run with the tokens `valid`.

    The first continues the state that comes into the run, and may be empty.
    """
    opens = pos[valid] == 0
    borders = opens if segment is None else pos[valid] % segment == 0
    edges = [0]
    if len(valid):
        edges = [0, *(1 + np.flatnonzero(borders[1:])).tolist(), len(valid)]
    chains = [_ChunkChain(source, [])]
    for start, stop in zip(edges[:-1], edges[1:]):
        if opens[start]:
            chains.append(_ChunkChain(nothing, []))
        begins = bool(borders[start]) and not opens[start]
        chains[-1].pieces.append((valid[start:stop], begins))
    return chains


def _slots(pieces: list[np.ndarray], nothing: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Returns (C, [N * C] the token in every slot, [N] the piece of every chunk)."""
    longest = max((len(tokens) for tokens in pieces), default=1)
    size = min(CHUNK, 1 << (longest - 1).bit_length())
    counts = [-(-len(tokens) // size) for tokens in pieces]
    slots = np.full(sum(counts) * size, nothing)
    first_slot = 0
    for tokens, count in zip(pieces, counts):
        slots[first_slot : first_slot + len(tokens)] = tokens
        first_slot += count * size
    return size, slots, np.repeat(np.arange(len(pieces)), counts)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """x [M, ...] at index [K], 0 where it is M."""
    padding = [0, 0] * (x.dim() - 1) + [0, 1]
    return F.pad(x, padding).index_select(0, index)
