"""Driver of SegmentSum: every run shares its sums over the documents that cross its ends.

A document that lies inside a run concerns its rank alone, so a run sends at most two sums, whatever
its length. One exchange a call; a rank sends (P - 1) 2 R sums for each row, independent of
the sequence's length.

Letters: B rows, T local tokens, P ranks, R runs on a rank (the largest number of any), F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.plans import planned
from models.primitives.segment_sum import (
    SegmentSum,
    documents,
    exclusive_cumsum,
    starts,
    validate_scope,
    within,
)
from models.span import Span, to_device
from parallel.collectives import Communicator, all_to_all_rows
from parallel.sharding import SequenceSharding

NOBODY = -2  # document number of an end of a run that sends nothing


class RunEnds(NamedTuple):
    """The ends of all runs as the tokens of this rank see them.

    A segment is the part of a document that lies within one run.

    Attributes:
        start: [B, T] int64, local index at which the token's segment begins.
        slot: [B, T] int64, end of a local run that the token's segment is: 2 run or 2 run + 1, and
            2 R for none.
        others: [B, T, P 2R] bool, ends of other runs that belong to the token's document (or row).
        earlier: [B, T, P 2R] bool, those of them that come before the token.
    """

    start: Tensor
    slot: Tensor
    others: Tensor
    earlier: Tensor


class ShardedSegmentSum(SegmentSum):
    """Replaces a SegmentSum whose rows are sharded over the ranks of `communicator`."""

    def __init__(self, core: SegmentSum, communicator: Communicator):
        super().__init__()
        self.core = core
        self.place = core.place
        self.communicator = communicator

    def _total(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Runs SegmentSum.total; `span.sharding` says which rank holds which tokens.

        Every rank gets bit-identical row sums.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return super()._total(x, span, over)
        ends, x, told = self._told(x, span, over)
        if over == "row":
            return told.sum(1, keepdim=True)
        return (within(x, ends.start) + _summed(ends.others, told)).to(x.dtype)

    def _before(self, x: Tensor, span: Span, over: str) -> Tensor:
        """Runs SegmentSum.before over the ranks."""
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return super()._before(x, span, over)
        ends, x, told = self._told(x, span, over)
        return (exclusive_cumsum(x, ends.start) + _summed(ends.earlier, told)).to(x.dtype)

    def _earlier(self, x: Tensor, span: Span, over: str) -> Tensor:
        if span.sharding is None:
            return self.core._earlier(x, span, over)
        return super()._earlier(x, span, over)

    def _openings(self, span: Span) -> tuple[Tensor, Tensor, Tensor]:
        sharding: SequenceSharding = span.sharding
        row = sharding.whole.map(lambda addresses: addresses[:, : sharding.layouts[0].tokens])
        before, after, some = super()._openings(row)
        return sharding.shard(before, 0), sharding.shard(after, 0), some

    def _over_ranks(self, part: Tensor) -> Tensor:
        ranks = self.communicator.size
        parts = self.communicator.all_to_all([part] * ranks, [part.numel()] * ranks, "tally")
        return torch.stack(parts).sum(0).view(part.shape)

    def _told(self, x: Tensor, span: Span, over: str) -> tuple[RunEnds, Tensor, Tensor]:
        """Returns the plan, x without padding, and [B, P 2R, ...] the sums of every rank's ends."""
        validate_scope(over)
        ends = run_ends(span, over)
        index = (...,) + (None,) * (x.dim() - 2)
        x = torch.where(span.valid()[index], x, 0)
        slots = ends.others.shape[2] // self.communicator.size
        mine = x.new_zeros(x.shape[0], slots + 1, *x.shape[2:]).scatter_add(
            1, ends.slot[index].expand_as(x), x
        )[:, :slots]
        each = [len(mine)] * self.communicator.size
        every = all_to_all_rows(
            mine.repeat(self.communicator.size, *[1] * (x.dim() - 1)),
            self.communicator,
            each,
            each,
            "tally",
        )
        return (
            ends,
            x,
            every.unflatten(0, (self.communicator.size, len(mine))).transpose(0, 1).flatten(1, 2),
        )


def _summed(which: Tensor, told: Tensor) -> Tensor:
    """Returns [B, T, ...], for each token the sum of its selected ends.

    Integers are summed in float64, which is exact below 2^53.
    """
    wide = told if told.is_floating_point() else told.double()
    flat = wide.flatten(2) if told.dim() > 2 else wide[..., None]
    out = which.to(wide.dtype) @ flat
    out = out.view(*which.shape[:2], *told.shape[2:])
    return out if told.is_floating_point() else out.round().to(told.dtype)


@planned
def run_ends(span: Span, over: str) -> RunEnds:
    """Returns what `_ends` does, built once for all layers."""
    return span.cache.get(("tally", over), lambda: _ends(span, over))


def _ends(span: Span, over: str) -> RunEnds:
    """Derives from the addresses of all ranks what each of them sends."""
    cut: SequenceSharding = span.sharding
    rows = span.shape[0]
    device = span.doc.device
    layouts = cut.layouts if len(cut.layouts) > 1 else cut.layouts * rows
    most = max(len(runs) for layout in layouts for runs in layout.runs)
    docs = []
    begins = []
    for rank, inner_span in enumerate(cut.spans):
        names = documents(inner_span.host(), over)
        for row, layout in enumerate(layouts):
            local = 0
            for number in range(most):
                start, stop = (
                    layout.runs[rank][number] if number < len(layout.runs[rank]) else (0, 0)
                )
                held = names[row, local : local + stop - start]
                head, tail = (int(held[0]), int(held[-1])) if len(held) else (NOBODY, NOBODY)
                docs.append((head, tail if tail != head else NOBODY))
                begins.append((start, start))
                local += stop - start
    shape = (len(cut.spans), rows, most, 2)
    doc, begin = (
        to_device(torch.tensor(x).view(shape).transpose(0, 1), device) for x in (docs, begins)
    )
    mine, run, run_start = documents(span, over), *_runs(cut, rows, device)
    here = doc[:, cut.rank].gather(
        1, run[..., None].expand(-1, -1, 2)
    )  # [B, T, 2] the ends of the token's own run
    head = mine == here[..., 0]
    tail = mine == here[..., 1]
    slot = torch.where(head, 2 * run, torch.where(tail, 2 * run + 1, 2 * most))
    breaks = torch.cat(
        [torch.ones_like(run[:, :1], dtype=torch.bool), run[:, 1:] != run[:, :-1]], 1
    )
    same = mine[..., None] == doc.flatten(1)[:, None]
    begin = begin.flatten(1)[:, None]
    return RunEnds(
        starts(span, over, breaks),
        slot,
        same & (begin != run_start[..., None]),
        same & (begin < run_start[..., None]),
    )


def _runs(cut: SequenceSharding, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns [B, T] the run number of each local token, and that run's first global token."""
    numbers = []
    begins = []
    for layout in cut.layouts:
        runs = layout.runs[cut.rank]
        sizes = torch.tensor([stop - start for start, stop in runs])
        numbers.append(torch.arange(len(runs)).repeat_interleave(sizes))
        begins.append(torch.tensor([start for start, _ in runs]).repeat_interleave(sizes))
    return tuple(
        to_device(torch.stack(some).expand(rows, -1), device) for some in (numbers, begins)
    )  # type: ignore[return-value]
