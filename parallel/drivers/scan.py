"""Passing: every run of tokens is summed up once, the summaries are folded in global order, every
run gets its state.

Summaries are dealt out, not gathered: a rank gets those of all runs for its share of (row, head),
folds them, and sends every run the state that comes into it. Two exchanges whatever the number of
ranks; a rank sends at most (P - 1) / P of (summary + state) of its runs, independent of the
sequence's length and, but for that factor, of P.

Source: Sun et al. 2025, LASP-2 (arXiv:2502.07563), who gather all summaries on all ranks, which
costs P - 1 summaries a rank and the same fold on every one. Ours takes any layout of runs and
documents that cross them.

Letters: B rows, P ranks, R runs on a rank (the most there are), H heads, D key width, E value
width, U (row, head) pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.carried_state import SHARDED, CarriedState
from models.kernels.scan_chunks import CONTINUE
from models.kernels.scan_chunkwise import apply_keep, carry_states
from models.primitives.scan import Scan
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, all_to_all_rows
from parallel.partition import unit_ranges
from parallel.sharding import SequenceSharding


class RunOrder(NamedTuple):
    """The runs of all ranks as this rank needs them.

    Attributes:
        lengths: [B][R] tokens of the runs held here, filled up with empty ones.
        order: [B, P R] which of the ranks' runs, end to end, is the next in global order.
        opened: [B, P R] does a document open there; in global order.
    """

    lengths: list[list[int]]
    order: Tensor
    opened: Tensor


class StatePassing(nn.Module):
    """Stands in for a Scan whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: Scan, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """As Scan.forward, with every run's state coming from the runs before it; at.cut says who
        holds which."""
        if ("passing",) not in span.plans:
            span.plans["passing",] = _run_order(span.sharding)
        order: RunOrder = span.plans["passing",]
        work = self.core.open(query, payload, span=span, runs=order.lengths)
        keep, gain, _ = work.summarise()
        return work.read(self._incoming(keep, gain, order, span.past))

    def _incoming(
        self, keep: Tensor, gain: Tensor, order: RunOrder, past: CarriedState | None
    ) -> Tensor:
        """[B, R, H, D, E]: the state that comes into every run held here."""
        rows, runs, heads, *state = gain.shape
        size, shares = self.communicator.size, unit_ranges(rows * heads, self.communicator.size)
        mine = shares[self.communicator.rank]
        kept = keep.expand(rows, runs, heads, *keep.shape[3:]).flatten(3)
        summary = (
            torch.cat([kept, gain.flatten(3)], -1).transpose(1, 2).flatten(0, 1)
        )  # [U, R, K + D E]
        given = [b - a for a, b in shares]
        taken = [mine[1] - mine[0]] * size
        every = all_to_all_rows(summary, self.communicator, given, taken, "summaries").unflatten(
            0, (size, taken[0])
        )
        row = torch.arange(*mine, device=gain.device) // heads
        there = order.order.to(gain.device)[row]  # [u, P R]
        line = _pick(every.transpose(0, 1).flatten(1, 2), there)
        kept, added = line.split([kept.shape[-1], gain[0, 0, 0].numel()], -1)
        kept = kept.unflatten(-1, keep.shape[3:])[:, :, None]
        added = added.unflatten(-1, state)[:, :, None]
        states = self._fold(kept, added, _origins(order.opened[row.cpu()]), past)
        back = (
            _pick(states[:, :, 0].flatten(2), there.argsort(1))
            .unflatten(1, (size, runs))
            .transpose(0, 1)
        )
        home = all_to_all_rows(
            back.flatten(0, 1), self.communicator, taken, given, "states"
        )  # [U, R, D E]
        return home.unflatten(0, (rows, heads)).transpose(1, 2).unflatten(-1, state)

    def _fold(
        self, keep: Tensor, gain: Tensor, origins: list[list[int]], past: CarriedState | None
    ) -> Tensor:
        """[u, P R, 1, D, E]: the state before every run, the first one's being what the rows before
        left; leaves the last."""
        found = None if past is None else past.state(self.core.place)
        if found is None:
            states = carry_states(keep, gain, gain, origins)
        else:
            start = found[:, None, None].to(gain.dtype)
            first = apply_keep(keep[:, :1], start) + gain[:, :1]
            begun = torch.cat([first, gain[:, 1:]], 1)
            states = torch.cat([start, carry_states(keep, begun, begun, origins)[:, 1:]], 1)
        if past is not None:
            past.store(
                self.core.place,
                (apply_keep(keep[:, -1], states[:, -1]) + gain[:, -1])[:, 0],
                SHARDED,
            )
        return states


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x [u, Q, F] in another order along Q."""
    return x.gather(1, index[..., None].expand_as(x))


def _origins(opened: Tensor) -> list[list[int]]:
    """[Q][u] for `carry`: after a run in which a document opens comes its gain, whatever came into
    it."""
    after = [[CONTINUE] * len(opened)]
    after += [
        [q if flag else CONTINUE for flag in flags]
        for q, flags in enumerate(opened.T[:-1].tolist())
    ]
    return after


def _run_order(cut: SequenceSharding) -> RunOrder:
    """Work out from the addresses of all ranks what every rank would say of its runs."""
    rows = cut.whole.shape[0]
    layouts = cut.layouts if len(cut.layouts) > 1 else cut.layouts * rows
    most = max(len(runs) for layout in layouts for runs in layout.runs)
    opens = [span.opens().cpu() for span in cut.spans]
    lengths = []
    order = []
    opened = []
    for row, layout in enumerate(layouts):
        found = []
        for rank, runs in enumerate(layout.runs):
            begin = 0
            for i in range(most):
                start, stop = runs[i] if i < len(runs) else (layout.length, layout.length)
                opening = bool(opens[rank][row, begin : begin + stop - start].any())
                found.append((start, stop, rank * most + i, opening))
                begin += stop - start
        lengths.append(
            [stop - start for start, stop, *_ in found[cut.rank * most : (cut.rank + 1) * most]]
        )
        found.sort()
        order.append([number for _, _, number, _ in found])
        opened.append([opening for *_, opening in found])
    return RunOrder(lengths, torch.tensor(order), torch.tensor(opened))
