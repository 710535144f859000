"""StatePassing driver of Scan: passes states between the runs of all ranks.

Every run of tokens is summarised once, the summaries are folded in global order, and every run
receives its incoming state. Summaries are dealt out, not gathered: a rank gets those of all runs
for its share of the (row, head) pairs, folds them, and sends every run its state. That takes two
exchanges whatever the number of ranks; a rank sends at most (P - 1) / P of (summary + state) of its
runs, independent of the sequence's length and, except for that factor, of P. What queries read
within their chunk is computed meanwhile.

Source: Sun et al. 2025, LASP-2 (arXiv:2502.07563), who gather all summaries on all ranks, which
costs P - 1 summaries a rank and the same fold on every one. Ours takes any layout of runs and
documents that cross them.

Letters: B rows, P ranks, R runs on a rank (the largest number of any), H heads, D key width, E
value width, U (row, head) pairs, u of them folded on this rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.carried_state import SHARDED, CarriedState
from models.kernels.scan_chunks import CONTINUE
from models.kernels.scan_chunkwise import apply_keep, carry_states
from models.plans import planned
from models.primitives.scan import Scan
from models.scores import Tensors
from models.span import Span, to_device
from parallel.collectives import Communicator
from parallel.partition import unit_ranges
from parallel.rows_in_flight import RowsInFlight
from parallel.sharding import SequenceSharding

EXCHANGES = 2  # of summaries and of states; something is computed during each


class RunOrder(NamedTuple):
    """Runs of all ranks as this rank needs them.

    Attributes:
        lengths: [B][R] tokens of the runs on this rank, filled up with empty runs.
        order: [B, P R] numbers of the runs (rank * R + run), in global order.
        opened: [B, P R] bool, in global order: a document begins in the run.
    """

    lengths: list[list[int]]
    order: Tensor
    opened: Tensor


class StatePassing(nn.Module):
    """Replaces a Scan whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: Scan, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """Runs Scan.forward, with every run's state coming from the runs before it.

        `span.sharding` says which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span)
        order = run_order(span)
        work = self.core.open(query, payload, span=span, runs=order.lengths, shares=EXCHANGES)
        keep, gain, _ = work.summarise()
        return work.read(self._incoming(keep, gain, order, span.past, work.read_ahead))

    def _incoming(
        self,
        keep: Tensor,
        gain: Tensor,
        order: RunOrder,
        past: CarriedState | None,
        meanwhile: Callable[[], None],
    ) -> Tensor:
        """Returns [B, R, H, D, E], the incoming state of every run on this rank.

        Args:
            meanwhile: what to compute during each exchange. In backward, where autograd goes
                through all in reverse, its gradients are computed during that of the gradients.
        """
        rows, runs, heads, *state_shape = gain.shape
        size = self.communicator.size
        ranges = unit_ranges(rows * heads, size)
        first, last = ranges[self.communicator.rank]
        flat_keep = keep.expand(rows, runs, heads, *keep.shape[3:]).flatten(3)
        summary = torch.cat([flat_keep, gain.flatten(3)], -1)
        summary = summary.transpose(1, 2).flatten(0, 1)  # [U, R, K + D E]
        given = [stop - start for start, stop in ranges]
        taken = [last - first] * size
        flight = RowsInFlight(summary, self.communicator, given, taken, "summaries")
        meanwhile()
        received = flight.wait()
        received = received.unflatten(0, (size, taken[0]))
        row = torch.arange(first, last) // heads
        global_order = to_device(order.order[row], gain.device)  # [u, P R]
        ordered = _pick(received.transpose(0, 1).flatten(1, 2), global_order)
        keep_size = flat_keep.shape[-1]
        gain_size = gain[0, 0, 0].numel()
        ordered_keep, ordered_gain = ordered.split([keep_size, gain_size], -1)
        # A dim of one head: the fold sees each (row, head) pair as a row of its own.
        ordered_keep = ordered_keep.unflatten(-1, keep.shape[3:])[:, :, None]
        ordered_gain = ordered_gain.unflatten(-1, state_shape)[:, :, None]
        origins = _origins(order.opened[row])
        states = self._fold(ordered_keep, ordered_gain, origins, past)
        by_rank = _pick(states[:, :, 0].flatten(2), global_order.argsort(1))
        by_rank = by_rank.unflatten(1, (size, runs)).transpose(0, 1).flatten(0, 1)
        flight = RowsInFlight(by_rank, self.communicator, taken, given, "states")
        meanwhile()
        incoming = flight.wait()
        incoming = incoming.unflatten(0, (rows, heads)).transpose(1, 2)  # [B, R, H, D E]
        return incoming.unflatten(-1, state_shape)

    def _fold(
        self, keep: Tensor, gain: Tensor, origins: list[list[int]], past: CarriedState | None
    ) -> Tensor:
        """Returns [u, P R, 1, D, E], the state before every run, and stores the last one.

        The state before the first run is what the rows before left.
        """
        carried = None if past is None else past.state(self.core.place)
        if carried is None:
            states = carry_states(keep, gain, gain, origins)
        else:
            start = carried[:, None, None].to(gain.dtype)
            first = apply_keep(keep[:, :1], start) + gain[:, :1]
            started_gain = torch.cat([first, gain[:, 1:]], 1)
            later = carry_states(keep, started_gain, started_gain, origins)[:, 1:]
            states = torch.cat([start, later], 1)
        if past is not None:
            last = apply_keep(keep[:, -1], states[:, -1]) + gain[:, -1]
            past.store(self.core.place, last[:, 0], SHARDED)
        return states


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """Returns x [u, Q, F] in another order along Q."""
    return x.gather(1, index[..., None].expand_as(x))


def _origins(opened: Tensor) -> list[list[int]]:
    """Returns [Q][u] origins for `carry_states`.

    After a run in which a document opens the state is that run's gain, whatever came into it.
    """
    pairs = len(opened)
    origins = [[CONTINUE] * pairs]
    for run, opens in enumerate(opened.T[:-1].tolist()):
        origins.append([run if opens_document else CONTINUE for opens_document in opens])
    return origins


@planned
def run_order(span: Span) -> RunOrder:
    """Derives from the addresses of all ranks what every rank would report of its runs."""
    return span.cache.get("passing", lambda: _run_order(span.sharding))


def _run_order(sharding: SequenceSharding) -> RunOrder:
    rows = sharding.whole.shape[0]
    layouts = sharding.layouts
    if len(layouts) == 1:
        layouts = layouts * rows
    most_runs = 0
    for layout in layouts:
        most_runs = max(most_runs, *(len(runs) for runs in layout.runs))
    opens = [span.host().opens() for span in sharding.spans]
    lengths = []
    order = []
    opened = []
    for row, layout in enumerate(layouts):
        row_runs = []
        for rank, runs in enumerate(layout.runs):
            local_start = 0
            for number in range(most_runs):
                # Empty runs fill up every rank to the same number; they sort to the end.
                start, stop = layout.length, layout.length
                if number < len(runs):
                    start, stop = runs[number]
                local_stop = local_start + stop - start
                opens_document = bool(opens[rank][row, local_start:local_stop].any())
                row_runs.append((start, stop, rank * most_runs + number, opens_document))
                local_start = local_stop
        own_runs = row_runs[sharding.rank * most_runs : (sharding.rank + 1) * most_runs]
        lengths.append([stop - start for start, stop, _, _ in own_runs])
        row_runs.sort()
        order.append([number for _, _, number, _ in row_runs])
        opened.append([opens_document for _, _, _, opens_document in row_runs])
    return RunOrder(lengths, torch.tensor(order), torch.tensor(opened))
