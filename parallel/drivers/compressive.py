"""Driver of CompressiveScan: a segmented memory whose runs are sharded over ranks.

Runs are summarised where they lie, and their summaries folded in global order. Segments need not
fit runs or ranks: what a run does to (closed, pending) has a summary wherever segments begin in it.
Summaries are dealt out by (row, head) as in StatePassing, whose order of runs this module uses; the
fold starts from what the row before left, and its last state stays on the rank that folds. Two
exchanges, whatever the number of ranks and of segments.

Letters: B rows, P ranks, R runs on a rank (the largest number of any), G heads, U (row, head)
pairs, u of them folded on this rank; a state is a matrix [m, n].
"""

import torch
from torch import Tensor, nn

from models.carried_state import SHARDED, CarriedState
from models.primitives.compressive import CompressiveScan
from models.scores import Tensors
from models.span import Span, to_device
from parallel.collectives import Communicator, all_to_all_rows
from parallel.drivers.scan import RunOrder, run_order
from parallel.partition import unit_ranges


class ShardedCompressive(nn.Module):
    """Replaces a CompressiveScan whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: CompressiveScan, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """Runs CompressiveScan.forward, with every run's state coming from the runs before it.

        `span.sharding` says which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span)
        order = run_order(span)
        work = self.core.open(query, payload, span=span, runs=order.lengths)
        keep, gain, _ = work.summarise()
        return work.read(self._incoming(keep, gain, order, span.past))

    def _incoming(
        self, keep: Tensor, gain: Tensor, order: RunOrder, past: CarriedState | None
    ) -> Tensor:
        """Returns [B, R, G, m, n], the incoming state of every run on this rank."""
        rows, runs, heads, *state_shape = gain.shape
        size = self.communicator.size
        ranges = unit_ranges(rows * heads, size)
        first, last = ranges[self.communicator.rank]
        given = [stop - start for start, stop in ranges]
        taken = [last - first] * size
        flat_keep = keep.expand(rows, runs, heads, *keep.shape[3:]).flatten(3)
        summary = torch.cat([flat_keep, gain.flatten(3)], -1)
        summary = summary.transpose(1, 2).flatten(0, 1)  # [U, R, K + m n]
        received = all_to_all_rows(summary, self.communicator, given, taken, "summaries")
        received = received.unflatten(0, (size, taken[0]))
        row = torch.arange(first, last) // heads
        global_order = to_device(order.order[row], gain.device)  # [u, P R]
        ordered = _pick(received.transpose(0, 1).flatten(1, 2), global_order)
        keep_size = flat_keep.shape[-1]
        gain_size = gain[0, 0, 0].numel()
        ordered_keep, ordered_gain = ordered.split([keep_size, gain_size], -1)
        start = None if past is None else past.state(self.core.place)
        if start is None:
            start = ordered_gain.new_zeros(len(row), *state_shape)
        states, last_state = fold(
            ordered_keep.unflatten(-1, keep.shape[3:]),
            ordered_gain.unflatten(-1, state_shape),
            to_device(order.opened[row], gain.device),
            start.to(ordered_gain.dtype),
        )
        if past is not None:
            next_row = self.core.carried(last_state) if past.closes_row else last_state
            past.store(self.core.place, next_row, SHARDED)
        by_rank = _pick(states.flatten(2), global_order.argsort(1))
        by_rank = by_rank.unflatten(1, (size, runs)).transpose(0, 1).flatten(0, 1)
        incoming = all_to_all_rows(by_rank, self.communicator, taken, given, "states")
        incoming = incoming.unflatten(0, (rows, heads)).transpose(1, 2)  # [B, R, G, m n]
        return incoming.unflatten(-1, state_shape)


def fold(keep: Tensor, gain: Tensor, opened: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Applies runs in order, where run q turns the state S into keep_q S + gain_q.

    Args:
        keep: [u, Q, m, m].
        gain: [u, Q, m, n].
        opened: [u, Q] bool; a document opens in the run, which drops the state before it.
        state: [u, m, n] before the first run.

    Returns:
        The state before every run, [u, Q, m, n], and the state after the last, [u, m, n].
    """
    states = []
    opened = opened[..., None, None]
    for run in range(keep.shape[1]):
        states.append(state)
        opens = opened[:, run]
        # Both factors are masked: a product with 0 would let a NaN of the document before through.
        masked_keep = torch.where(opens, 0, keep[:, run])
        masked_state = torch.where(opens, 0, state)
        continued = masked_keep @ masked_state + gain[:, run]
        state = torch.where(opens, gain[:, run], continued)
    return torch.stack(states, 1), state


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Returns x [u, Q, F] in another order along Q."""
    return x.gather(1, index[..., None].expand_as(x))
