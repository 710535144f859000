"""Variable-length layout: rows as stretches end to end, for kernels that take packed sequences.

A stretch has no padding, and a new one begins with each run and each document.

Letters: B rows, T tokens, N valid tokens, S stretches, R runs.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.kernels.scan_chunks import Runs, on_host, run_lengths
from models.plans import planned
from models.span import PADDING, Span, to_device


@dataclass(frozen=True)
class VarlenLayout:
    """Positions of the valid tokens of B rows of T, laid end to end.

    Attributes:
        shape: (B, T).
        index: [N] int64, row * T + token of each.
        run: [N] int64, row * R + run of each.
        ends: [S + 1] int64, 0 and the end of each stretch.
        origin: [S] int64, row * R + run whose incoming state a stretch starts from, or -1: it
            starts from an empty state.
        last: [B R] int64, the last stretch of each run, or -1 where it has no valid token.
        through: [B R] int64, S + row * R + run: where the incoming state stands behind the S last
            ones.
        opened: [B, R] bool, whether a document opens in this run.
    """

    shape: tuple[int, int]
    index: Tensor
    run: Tensor
    ends: Tensor
    origin: Tensor
    last: Tensor
    through: Tensor
    opened: Tensor

    def pick(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, N, ...]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def spread(self, x: Tensor) -> Tensor:
        """[1, N, ...] -> [B, T, ...]; 0 at padding."""
        rows, tokens = self.shape
        blank = x.new_zeros(rows * tokens, *x.shape[2:])
        return blank.index_copy(0, self.index, x[0]).unflatten(0, self.shape)


@planned
def varlen_layout(span: Span, runs: Runs | None = None) -> VarlenLayout:
    """Returns the layout of these rows; computed on the host once for all layers of a step.

    Args:
        runs: as in `chunk_layout`.
    """
    lengths = run_lengths(span, runs)
    return span.cache.get(("stretches", lengths), lambda: _build(span, lengths))


def _build(span: Span, lengths: tuple[tuple[int, ...], ...]) -> VarlenLayout:
    pos, doc = on_host(span)
    rows, tokens = span.shape
    runs = len(lengths[0])
    ends = [0]
    origin = []
    last = np.full(rows * runs, -1)
    opened = np.zeros(rows * runs, dtype=bool)
    index = []
    run = []
    for row, row_lengths in enumerate(lengths):
        run_start = 0
        for number, length in enumerate(row_lengths, row * runs):
            valid = run_start + np.flatnonzero(doc[row, run_start : run_start + length] != PADDING)
            begins = np.flatnonzero(pos[row, valid] == 0)
            edges = [0, *begins[begins > 0].tolist(), len(valid)]
            for start, stop in zip(edges[:-1], edges[1:]):
                if stop == start:
                    continue
                last[number] = len(origin)
                fresh = len(begins) > 0 and start >= begins[0]
                origin.append(-1 if fresh else number)
                ends.append(ends[-1] + stop - start)
            index.append(row * tokens + valid)
            run.append(np.full(len(valid), number))
            opened[number] = len(begins) > 0
            run_start += length

    def on_device(values: list | np.ndarray) -> Tensor:
        return to_device(np.asarray(values), span.pos.device)

    return VarlenLayout(
        shape=(rows, tokens),
        index=on_device(np.concatenate(index)),
        run=on_device(np.concatenate(run)),
        ends=on_device(ends),
        origin=on_device(np.array(origin, dtype=np.int64)),
        last=on_device(last),
        through=on_device(len(origin) + np.arange(len(last))),
        opened=on_device(opened).view(rows, runs),
    )
