"""Stretches of a row for kernels that take sequences end to end: no padding, and a new stretch for
each run and document.

Letters: B rows, T tokens, N valid tokens, S stretches, R runs.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from models.kernels.scan_chunks import Runs, on_host
from models.span import PADDING, Span


@dataclass(frozen=True)
class VarlenLayout:
    """How the valid tokens of B rows of T lie end to end.

    Attributes: shape: (B, T). index: [N] int64, row * T + token of each. run: [N] int64, row * R +
        run of each. ends: [S + 1] int64, 0 and the end of each stretch. origin: [S] int64, row * R
        + run whose incoming state a stretch starts from, or -1: it starts from nothing. last: [B R]
        int64, the last stretch of each run, or -1 where it has no valid token. through: [B R]
        int64, S + row * R + run: where the incoming state stands behind the S last ones. opened:
        [B, R] bool, does a document open in this run?
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
        return (
            x.new_zeros(rows * tokens, *x.shape[2:])
            .index_copy(0, self.index, x[0])
            .unflatten(0, self.shape)
        )


def varlen_layout(span: Span, runs: Runs | None = None) -> VarlenLayout:
    """Of the rows of `at`; worked out on the host once for all layers of a step. `runs` as in
    models.kernels.scan_chunks."""
    rows, tokens = span.shape
    lengths = tuple(map(tuple, runs)) if runs is not None else ((tokens,),) * rows
    key = ("stretches", lengths)
    if key not in span.plans:
        span.plans[key] = _build(span, lengths)
    return span.plans[key]


def _build(span: Span, lengths: tuple[tuple[int, ...], ...]) -> VarlenLayout:
    pos, doc = on_host(span)
    tokens = span.shape[1]
    most = len(lengths[0])
    ends = [0]
    origin = []
    last = np.full(len(lengths) * most, -1)
    opened = np.zeros(len(lengths) * most, dtype=bool)
    index = []
    run = []
    for row, each in enumerate(lengths):
        start = 0
        for number, length in enumerate(each, row * most):
            there = start + np.flatnonzero(doc[row, start : start + length] != PADDING)
            begins = np.flatnonzero(pos[row, there] == 0)
            edges = [0, *begins[begins > 0].tolist(), len(there)]
            for a, b in zip(edges[:-1], edges[1:]):
                if b > a:
                    last[number] = len(origin)
                    origin.append(-1 if len(begins) and a >= begins[0] else number)
                    ends.append(ends[-1] + b - a)
            index.append(row * tokens + there)
            run.append(np.full(len(there), number))
            opened[number] = len(begins) > 0
            start += length

    def put(x: list | np.ndarray) -> Tensor:
        return torch.as_tensor(np.asarray(x), device=span.pos.device)

    return VarlenLayout(
        shape=(len(lengths), tokens),
        index=put(np.concatenate(index)),
        run=put(np.concatenate(run)),
        ends=put(ends),
        origin=put(np.array(origin, dtype=np.int64)),
        last=put(last),
        through=put(len(origin) + np.arange(len(last))),
        opened=put(opened).view(len(lengths), most),
    )
