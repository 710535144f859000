"""Shards a micro-batch over the ranks that share it, with the addresses of all ranks' tokens.

A Span carries its SequenceSharding through the model; drivers read it there, so that no driver
holds the state of a step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from models.plans import planned
from models.span import PADDING, READ, TEXT, Span, to_device
from parallel.layout import Layout


@dataclass(frozen=True)
class SequenceSharding:
    """Sharding of the rows of a micro-batch over ranks.

    Attributes: layouts: one for each row, or a single one for all rows; all give every rank equally
        many tokens. rank: which part is held here. spans: every rank's addresses, in rank order.
        whole: the addresses of the whole rows, in global order, padding at the end. kept: what
        drivers worked out from these addresses, for other layers and the backward pass. parts: the
        two cuts that this one was joined of, or none. role: which all tokens were cast into, or
        None.
    """

    layouts: tuple[Layout, ...]
    rank: int
    spans: tuple[Span, ...]
    whole: Span
    orders: list = field(default_factory=list, compare=False, repr=False)
    kept: dict = field(default_factory=dict, compare=False, repr=False)
    parts: tuple["SequenceSharding", ...] = ()
    role: int | None = None

    @property
    def ranks(self) -> int:
        return self.layouts[0].ranks

    def _order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """[1 or B, length] indices: rank order to global order, and back."""
        if not self.orders:
            there = torch.stack([row.order() for row in self.layouts])
            self.orders.append((to_device(there, device), to_device(there.argsort(1), device)))
        return self.orders[0]

    def to_global_order(self, x: Tensor) -> Tensor:
        """[B, length, ...] from the ranks' tokens laid end to end into global order."""
        return _pick(x, self._order(x.device)[0])

    def to_rank_order(self, x: Tensor) -> Tensor:
        """[B, length, ...] from global order into the ranks' tokens laid end to end."""
        return _pick(x, self._order(x.device)[1])

    def index(self, rank: int, rows: int) -> Tensor:
        """[rows, each] int64 on the CPU: global indices of the tokens of `rank`."""
        index = torch.stack([row.index(rank) for row in self.layouts])
        return index.expand(rows, -1)

    @planned
    def grouped(self, parts: int) -> "RankGroup":
        """This cut as `parts` neighbouring ranks see it once they have put their tokens
        together."""
        if ("group", parts) not in self.kept:
            spans = tuple(
                _concatenated(self.spans[i : i + parts]) for i in range(0, self.ranks, parts)
            )
            layouts = tuple(row.grouped(parts) for row in self.layouts)
            rank = self.rank // parts
            cut = SequenceSharding(layouts, rank, spans, self.whole)
            self.kept["group", parts] = RankGroup(spans[rank].with_sharding(cut))
        return self.kept["group", parts]

    def join(self, other: "SequenceSharding") -> "SequenceSharding":
        """Two rows over the same ranks as one, this one's tokens first; a rank holds its part of
        each, end to end."""
        rows = max(len(self.layouts), len(other.layouts))
        mine, theirs = (c.layouts * (rows // len(c.layouts)) for c in (self, other))
        spans = tuple(_concatenated(both) for both in zip(self.spans, other.spans, strict=True))
        cut = SequenceSharding(
            tuple(a.join(b) for a, b in zip(mine, theirs, strict=True)),
            self.rank,
            spans,
            self.whole,
        )
        return replace(
            cut, whole=_concatenated(spans).map(cut.to_global_order), parts=(self, other)
        )

    def cast(self, role: int) -> "SequenceSharding":
        """The same cut of tokens that all have this role."""
        return replace(
            self,
            spans=tuple(s.cast(role) for s in self.spans),
            whole=self.whole.cast(role),
            role=role,
            kept={},
        )

    def line(self, first: int) -> tuple[Span, ...]:
        """Every rank's addresses, were each row one document that begins at `first`, behind what
        was read before it."""
        if self.parts:
            return tuple(a.join(b) for a, b in zip(*(part.line(first) for part in self.parts)))
        tokens = self.layouts[0].tokens
        span = Span.line(1, tokens) if self.role is None else Span.line(1, tokens).cast(self.role)
        span = span.with_pos(span.pos + (first - tokens if self.role == READ else first))
        return shard_span(span, self.layouts[:1], 0).sharding.spans

    def before(self) -> int:
        """Tokens that were read before the row."""
        return (
            sum(part.before() for part in self.parts)
            if self.parts
            else self.layouts[0].tokens * (self.role == READ)
        )

    def shard(self, x: Tensor, fill: float) -> Tensor:
        """[B, tokens, ...] -> [B, each, ...]: the part of this rank."""
        return _shard(self.layouts, x, self.rank, fill)


@dataclass(frozen=True)
class RankGroup:
    """Neighbouring ranks that hold their tokens together, end to end; `whole` carries the cut among
    such groups."""

    whole: Span

    def to_global_order(self, x: Tensor) -> Tensor:
        """[B, tokens, ...] as it is: the order of the group is that of its ranks laid end to
        end."""
        return x

    to_rank_order = to_global_order


def _concatenated(spans: Sequence[Span]) -> Span:
    """Addresses of several ranks, end to end."""
    pos, doc, role = (torch.cat(some, 1) for some in zip(*((s.pos, s.doc, s.role) for s in spans)))
    copies = [span.copy for span in spans if span.copy is not None]
    copy = _concatenated(copies) if len(copies) == len(spans) else None
    return Span(pos, doc, role, copy=copy)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    if len(index) == 1:
        return x.index_select(1, index[0])
    return x.gather(1, index.view(*index.shape, *[1] * (x.dim() - 2)).expand_as(x))


def _shard(layouts: Sequence[Layout], x: Tensor, rank: int, fill: float) -> Tensor:
    if len(layouts) == 1:
        return layouts[0].shard(x.transpose(0, 1), rank, fill).transpose(0, 1)
    return torch.stack(
        [layout.shard(row, rank, fill) for layout, row in zip(layouts, x, strict=True)]
    )


def shard_span(span: Span, layouts: Sequence[Layout], rank: int) -> Span:
    """The addresses of this rank's tokens, carrying the Cut.

    Args:
        span: [B, tokens] addresses of the whole rows, as every rank has them.
        layouts: one for each row, or a single one for all.
    """
    parts = []
    for other in range(layouts[0].ranks):
        pos, doc, role = (
            _shard(layouts, x, other, fill)
            for x, fill in ((span.pos, 0), (span.doc, PADDING), (span.role, TEXT))
        )
        parts.append(Span(pos, doc, role))
    return sharded_from(parts, layouts, rank)


def moved(span: Span, move: Callable[[Tensor], Tensor]) -> Span:
    """The same addresses on another device, and with them those of all ranks.

    Args:
        span: on the CPU, sharded or not; what is planned of the result is read from it.
        move: copies a tensor to the device.
    """
    cut = span.sharding
    if cut is None:
        return span.moved(move)
    there = SequenceSharding(
        cut.layouts,
        cut.rank,
        tuple(part.moved(move) for part in cut.spans),
        cut.whole.moved(move),
        orders=[(move(into), move(back)) for into, back in cut.orders],
    )
    return span.moved(move).with_sharding(there)


def sharded_from(spans: Sequence[Span], layouts: Sequence[Layout], rank: int) -> Span:
    """The addresses of this rank's tokens, carrying the Cut, given those of every rank."""
    cut = SequenceSharding(tuple(layouts), rank, tuple(spans), spans[rank])
    cut = replace(cut, whole=_concatenated(spans).map(cut.to_global_order))
    return spans[rank].with_sharding(cut)
