"""Compressing: a segmented memory over ranks. Runs are summed up where they lie, and their
summaries folded in global order.

Segments need not fit runs or ranks: what a run does to (closed, pending) has a summary wherever
segments begin in it. Summaries are dealt out by (row, head) as in Passing, whose order of runs this
uses; the fold starts from what the row before left, and what it ends with stays with the rank that
folds. Two exchanges, whatever the number of ranks and of segments.

Letters: B rows, P ranks, R runs on a rank (the most there are), G heads, U (row, head) pairs, u of
them folded here; a state is a matrix [m, n].
"""

import torch
from torch import Tensor, nn

from models.carried_state import SHARDED, CarriedState
from models.primitives.compressive import CompressiveScan
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, all_to_all_rows
from parallel.drivers.scan import RunOrder, _run_order
from parallel.partition import unit_ranges


class ShardedCompressive(nn.Module):
    """Stands in for a Compress whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: CompressiveScan, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """As Compress.forward, with every run's state coming from the runs before it; at.cut says
        who holds which."""
        if ("compressing",) not in span.plans:
            span.plans["compressing",] = _run_order(span.sharding)
        order: RunOrder = span.plans["compressing",]
        work = self.core.open(query, payload, span=span, runs=order.lengths)
        keep, gain, _ = work.summarise()
        return work.read(self._incoming(keep, gain, order, span.past))

    def _incoming(
        self, keep: Tensor, gain: Tensor, order: RunOrder, past: CarriedState | None
    ) -> Tensor:
        """[B, R, G, m, n]: the state that comes into every run held here."""
        rows, runs, heads, *state = gain.shape
        shares = unit_ranges(rows * heads, self.communicator.size)
        mine = shares[self.communicator.rank]
        given = [b - a for a, b in shares]
        taken = [mine[1] - mine[0]] * self.communicator.size
        kept = keep.expand(rows, runs, heads, *keep.shape[3:]).flatten(3)
        summary = (
            torch.cat([kept, gain.flatten(3)], -1).transpose(1, 2).flatten(0, 1)
        )  # [U, R, K + m n]
        every = all_to_all_rows(summary, self.communicator, given, taken, "summaries").unflatten(
            0, (self.communicator.size, taken[0])
        )
        row = torch.arange(*mine) // heads
        there = order.order[row].to(gain.device)  # [u, P R]
        line = _picked(every.transpose(0, 1).flatten(1, 2), there)
        kept, added = line.split([kept.shape[-1], gain[0, 0, 0].numel()], -1)
        start = None if past is None else past.state(self.core.place)
        start = added.new_zeros(len(row), *state) if start is None else start.to(added.dtype)
        opened = order.opened[row].to(gain.device)
        states, last = fold(
            kept.unflatten(-1, keep.shape[3:]), added.unflatten(-1, state), opened, start
        )
        if past is not None:
            past.store(self.core.place, self.core.carried(last), SHARDED)
        back = (
            _picked(states.flatten(2), there.argsort(1))
            .unflatten(1, (self.communicator.size, runs))
            .transpose(0, 1)
        )
        home = all_to_all_rows(
            back.flatten(0, 1), self.communicator, taken, given, "states"
        )  # [U, R, m n]
        return home.unflatten(0, (rows, heads)).transpose(1, 2).unflatten(-1, state)


def fold(keep: Tensor, gain: Tensor, opened: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """(the state before every run [u, Q, m, n], and after the last [u, m, n]), when run q turns S
    into keep_q S + gain_q.

    Args:
        keep: [u, Q, m, m].
        opened: [u, Q] bool; a document opens there, and what came before is gone, were it not a
            number.
        state: [u, m, n] before the first run.
    """
    states = []
    for k, g, fresh in zip(keep.unbind(1), gain.unbind(1), opened[..., None, None].unbind(1)):
        states.append(state)
        state = torch.where(fresh, g, torch.where(fresh, 0, k) @ torch.where(fresh, 0, state) + g)
    return torch.stack(states, 1), state


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """x [u, Q, F] in another order along Q."""
    return x.gather(1, index[..., None].expand_as(x))
