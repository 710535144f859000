"""Halo: every run borrows the few tokens before it from whichever runs hold them.

Every rank works out from the layouts who needs what, so one exchange is enough, over as many runs
as it takes.
Letters: B rows, T local tokens, C channels, J taps.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.primitives.causal_conv import CausalConv, with_tail
from models.scores import Tensors
from models.span import PADDING, Span
from parallel.collectives import Communicator, all_to_all_rows
from parallel.layout import Layout
from parallel.sharding import SequenceSharding


class HaloPlan(NamedTuple):
    """Who lends what to whom, seen from one rank.

    Attributes: lent: [sum(given)] int64, which local tokens (row * T + token) go out, those for
        rank 0 first. given, taken: how many to and from each rank. wider: [B, W] int64, local
        tokens with those borrowed before each run: below B * T a local token, from there on a
            borrowed one in order of arrival, -1 filling up.
        inside: [B, T] int64, where the local tokens are in `wider`.
        span: [B, W] addresses.
    """

    lent: Tensor
    given: list[int]
    taken: list[int]
    wider: Tensor
    inside: Tensor
    span: Span


class Halo(nn.Module):
    """Stands in for a Window whose tokens lie over the ranks of `wire`."""

    def __init__(self, core: CausalConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """As Window.forward, reading tokens of other ranks; at.cut says who holds which."""
        reach = len(params[0]) - 1
        x, span, skip = with_tail(self.core.place, payload[0], reach, span)
        key = ("halo", reach)
        if key not in span.plans:
            span.plans[key] = _plan(span.sharding, reach, x.device)
        loan: HaloPlan = span.plans[key]
        flat = x.flatten(0, 1)
        borrowed = all_to_all_rows(
            flat[loan.lent], self.communicator, loan.given, loan.taken, "halo"
        )
        nothing = flat.new_zeros(1, flat.shape[1])
        wide = torch.cat([flat, borrowed, nothing])[loan.wider]  # -1 is the last, which is nothing
        out = self.core((wide,), params, span=loan.span)
        return out.gather(1, loan.inside[..., None].expand(*loan.inside.shape, out.shape[2]))[
            :, skip:
        ]


class _RowOwners:
    """One row's runs of all ranks, and where each token lies."""

    def __init__(self, layout: Layout):
        self.runs = layout.runs
        self.table = []
        for rank, runs in enumerate(layout.runs):
            begin = 0
            for start, stop in runs:
                self.table.append((start, stop, rank, begin))
                begin += stop - start
        self.table = sorted(run for run in self.table if run[1] > run[0])
        self.starts = [run[0] for run in self.table]

    def home(self, token: int) -> tuple[int, int]:
        """(rank, local token)."""
        start, _, rank, begin = self.table[bisect_right(self.starts, token) - 1]
        return rank, begin + token - start

    def needs(self, rank: int, reach: int) -> list[int]:
        """What `rank` reads and does not hold, in the order in which it wants it."""
        before = [
            t
            for start, stop in self.runs[rank]
            if stop > start
            for t in range(max(0, start - reach), start)
        ]
        return [t for t in dict.fromkeys(before) if self.home(t)[0] != rank]


def _plan(cut: SequenceSharding, reach: int, device: torch.device) -> HaloPlan:
    number = cut.whole.shape[0]
    each = cut.layouts[0].each
    rank = cut.rank
    rows = [
        _RowOwners(layout)
        for layout in (cut.layouts if len(cut.layouts) > 1 else cut.layouts * number)
    ]
    lent: list[int] = []
    given = []
    wanted = []
    for other in range(cut.ranks):
        out = [
            (b, row.home(t))
            for b, row in enumerate(rows)
            for t in row.needs(other, reach)
            if other != rank
        ]
        lent += [b * each + local for b, (owner, local) in out if owner == rank]
        given.append(sum(owner == rank for _, (owner, _) in out))
    mine = [(row.home(t)[0], b, t) for b, row in enumerate(rows) for t in row.needs(rank, reach)]
    for other in range(cut.ranks):
        wanted += [(b, t) for owner, b, t in mine if owner == other]
    taken = [sum(owner == other for owner, _, _ in mine) for other in range(cut.ranks)]
    arrival = {need: number * each + i for i, need in enumerate(wanted)}
    lines = [_line(row, b, rank, reach, each, arrival) for b, row in enumerate(rows)]
    width = max(len(wider) for wider, _, _ in lines)
    wider = torch.stack([F.pad(line, (0, width - len(line)), value=-1) for line, _, _ in lines]).to(
        device
    )
    tokens = torch.stack(
        [F.pad(line, (0, width - len(line)), value=-1) for _, line, _ in lines]
    ).to(device)
    picked = tokens.clamp_min(0)
    pos, doc, role = (x.gather(1, picked) for x in (cut.whole.pos, cut.whole.doc, cut.whole.role))
    span = Span(pos, doc.masked_fill(tokens < 0, PADDING), role)
    inside = torch.stack([line for _, _, line in lines]).to(device)
    return HaloPlan(
        torch.tensor(lent, device=device, dtype=torch.long), given, taken, wider, inside, span
    )


def _line(
    row: _RowOwners,
    number: int,
    rank: int,
    reach: int,
    each: int,
    arrival: dict[tuple[int, int], int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row: where to take its runs, each after what it borrows; their global tokens; where
    the own ones come to lie."""
    wider = []
    tokens = []
    inside = []
    local = length = 0
    for start, stop in row.runs[rank]:
        if stop == start:
            continue
        before = range(max(0, start - reach), start)
        homes = [row.home(t) for t in before]
        found = [
            number * each + span if owner == rank else arrival[number, t]
            for t, (owner, span) in zip(before, homes)
        ]
        wider += [
            torch.tensor(found, dtype=torch.long),
            torch.arange(local, local + stop - start) + number * each,
        ]
        tokens.append(torch.arange(start - len(before), stop))
        inside.append(torch.arange(stop - start) + length + len(before))
        local = local + stop - start
        length = length + len(before) + stop - start
    return torch.cat(wider), torch.cat(tokens), torch.cat(inside)
