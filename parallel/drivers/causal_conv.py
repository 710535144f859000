"""Halo driver of CausalConv: every run borrows the few tokens before it from other ranks.

Every rank derives from the layouts who needs what, so one exchange is enough, however many runs a
halo reaches over.

Letters: B rows, T local tokens, C channels, J taps, W tokens with borrowed ones.
"""

from bisect import bisect_right
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.plans import planned
from models.primitives.causal_conv import CausalConv, with_tail
from models.scores import Tensors
from models.span import PADDING, Span, to_device
from parallel.collectives import Communicator, all_to_all_rows
from parallel.layout import Layout
from parallel.sharding import SequenceSharding


class HaloPlan(NamedTuple):
    """The exchange of borrowed tokens as one rank sees it.

    Attributes:
        lent: [sum(given)] int64, local tokens (row * T + token) that this rank sends, those for
            rank 0 first.
        given, taken: numbers of tokens sent to and received from each rank.
        wider: [B, W] int64, local tokens with those borrowed before each run: below B * T a local
            token, from there on a borrowed one in order of arrival, -1 filling up.
        inside: [B, T] int64, positions of the local tokens in `wider`.
        span: [B, W] addresses.
    """

    lent: Tensor
    given: list[int]
    taken: list[int]
    wider: Tensor
    inside: Tensor
    span: Span


class Halo(nn.Module):
    """Replaces a CausalConv whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: CausalConv, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """Runs CausalConv.forward, reading tokens of other ranks.

        `span.sharding` says which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(payload, params, span=span)
        reach = len(params[0]) - 1
        x, span, skip = with_tail(self.core.place, payload[0], reach, span)
        plan = halo_plan(span, reach)
        flat = x.flatten(0, 1)
        borrowed = all_to_all_rows(
            flat[plan.lent], self.communicator, plan.given, plan.taken, "halo"
        )
        # The last row, which index -1 of the plan points to, is the zero that fills up.
        filler = flat.new_zeros(1, flat.shape[1])
        wider = torch.cat([flat, borrowed, filler])[plan.wider]
        output = self.core((wider,), params, span=plan.span)
        index = plan.inside[..., None].expand(*plan.inside.shape, output.shape[2])
        return output.gather(1, index)[:, skip:]


class _RowOwners:
    """All ranks' runs of one row, and the owner of each token."""

    def __init__(self, layout: Layout):
        self.runs = layout.runs
        table = []
        for rank, runs in enumerate(layout.runs):
            local_start = 0
            for start, stop in runs:
                if stop > start:
                    table.append((start, stop, rank, local_start))
                local_start += stop - start
        self.table = sorted(table)
        self.starts = [start for start, _, _, _ in self.table]

    def home(self, token: int) -> tuple[int, int]:
        """Returns (rank, local token) of a global token."""
        start, _, rank, local_start = self.table[bisect_right(self.starts, token) - 1]
        return rank, local_start + token - start

    def needs(self, rank: int, reach: int) -> list[int]:
        """Returns the tokens that `rank` reads and does not hold, in the order of reading."""
        tokens: dict[int, None] = {}  # a dict keeps the order and drops repetitions
        for start, stop in self.runs[rank]:
            if stop == start:
                continue
            for token in range(max(0, start - reach), start):
                if self.home(token)[0] != rank:
                    tokens[token] = None
        return list(tokens)


@planned
def halo_plan(span: Span, reach: int) -> HaloPlan:
    """Returns how the `reach` tokens before each run of this rank come to it."""
    device = span.pos.device
    return span.cache.get(("halo", reach), lambda: _halo_plan(span.sharding, reach, device))


def _halo_plan(sharding: SequenceSharding, reach: int, device: torch.device) -> HaloPlan:
    """Derives the exchange from the layouts; the order of requests is the same on every rank."""
    number_of_rows = sharding.whole.shape[0]
    local_tokens = sharding.layouts[0].tokens_per_rank
    rank = sharding.rank
    layouts = sharding.layouts
    if len(layouts) == 1:
        layouts = layouts * number_of_rows
    rows = [_RowOwners(layout) for layout in layouts]
    lent: list[int] = []
    given = []
    for other in range(sharding.ranks):
        given_before = len(lent)
        if other != rank:
            for row_index, row in enumerate(rows):
                for token in row.needs(other, reach):
                    owner, local = row.home(token)
                    if owner == rank:
                        lent.append(row_index * local_tokens + local)
        given.append(len(lent) - given_before)
    requests_by_owner: list[list[tuple[int, int]]] = [[] for _ in range(sharding.ranks)]
    for row_index, row in enumerate(rows):
        for token in row.needs(rank, reach):
            requests_by_owner[row.home(token)[0]].append((row_index, token))
    arrival = {}
    for requests in requests_by_owner:
        for request in requests:
            arrival[request] = number_of_rows * local_tokens + len(arrival)
    row_plans = []
    for row_index, row in enumerate(rows):
        row_plans.append(_row_plan(row, row_index, rank, reach, local_tokens, arrival))
    wider = to_device(_padded([sources for sources, _, _ in row_plans]), device)
    tokens = to_device(_padded([globals_ for _, globals_, _ in row_plans]), device)
    inside = to_device(torch.stack([positions for _, _, positions in row_plans]), device)
    addresses = sharding.whole.map(lambda field: field.gather(1, tokens.clamp_min(0)))
    doc = addresses.doc.masked_fill(tokens < 0, PADDING)
    return HaloPlan(
        lent=to_device(lent, device, torch.long),
        given=given,
        taken=[len(requests) for requests in requests_by_owner],
        wider=wider,
        inside=inside,
        span=Span(addresses.pos, doc, addresses.role),
    )


def _padded(rows: list[Tensor]) -> Tensor:
    """Stacks rows of different lengths, filled up with -1."""
    width = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, width - len(row)), value=-1) for row in rows])


def _row_plan(
    row: _RowOwners,
    row_index: int,
    rank: int,
    reach: int,
    local_tokens: int,
    arrival: dict[tuple[int, int], int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Plans one row: its local runs, each after the tokens that it borrows.

    Args:
        arrival: index of each borrowed (row, token) among local and then borrowed tokens.

    Returns:
        Indices of the tokens, their global numbers, and the positions of the local ones.
    """
    sources = []
    global_tokens = []
    positions = []
    local_start = 0
    length = 0
    for start, stop in row.runs[rank]:
        if stop == start:
            continue
        halo_sources = []
        for token in range(max(0, start - reach), start):
            owner, local = row.home(token)
            if owner == rank:
                halo_sources.append(row_index * local_tokens + local)
            else:
                halo_sources.append(arrival[row_index, token])
        halo = len(halo_sources)
        run = stop - start
        sources.append(torch.tensor(halo_sources, dtype=torch.long))
        sources.append(torch.arange(local_start, local_start + run) + row_index * local_tokens)
        global_tokens.append(torch.arange(start - halo, stop))
        positions.append(torch.arange(run) + length + halo)
        local_start += run
        length += halo + run
    return torch.cat(sources), torch.cat(global_tokens), torch.cat(positions)
