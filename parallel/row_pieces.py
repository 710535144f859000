"""A row cut in time whose pieces are sharded over ranks: what a piece left stays where it lies.

A driver gets the keys of earlier pieces beside those at hand and moves them by its own method; what
crosses ranks in forward crosses them again in backward, so gradients come home to the rank that
left what they belong to.

Letters: B rows, T tokens of a piece, S tokens on a rank, m of them that are kept, P ranks.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from models.carried_state import CarriedState
from models.pieces.chunks import Selection, kept_addresses, kept_first
from models.pieces.piece_state import PieceState
from models.span import Span, to_device
from parallel.layout import Interval, Layout
from parallel.sharding import SequenceSharding, sharded_from


def piece_state(pieces: Sequence[Span], outer: CarriedState | None = None) -> PieceState:
    """Returns the state of rows in pieces, sharded or not; see PieceState."""
    sharded = pieces[0].sharding is not None
    return (ShardedPieceState if sharded else PieceState)(pieces, outer)


class ShardedPieceState(PieceState):
    """PieceState of rows whose pieces are sharded, each by a layout of its own."""

    def _whole(self, row: Span) -> Span:
        sharding: SequenceSharding = row.sharding
        return sharding.whole.map(lambda addresses: addresses[:, : sharding.layouts[0].tokens])

    def _fresh(self, span: Span) -> Span:
        # What drivers worked out in the first pass need not last until the second.
        sharding = replace(span.sharding, orders=[], kept={})
        return span.with_sharding(sharding)

    def _parts(self, span: Span) -> Sequence[Span]:
        return span.sharding.spans

    def _last_tokens(self, span: Span, length: int) -> list[Tensor]:
        sharding: SequenceSharding = span.sharding
        tokens = sharding.layouts[0].tokens
        marks = []
        for rank in range(sharding.ranks):
            index = sharding.index(rank, span.shape[0])
            marks.append((index >= tokens - length) & (index < tokens))
        return marks

    def _selected(self, span: Span, keeps: list[Tensor]) -> Selection:
        """Takes marked tokens, on every rank and of every row as many as anywhere."""
        sharding: SequenceSharding = span.sharding
        size = max(int(keep.sum(1).max()) for keep in keeps)
        picked = [kept_first(keep, size) for keep in keeps]
        spans = []
        places = []
        for rank, (index, filled) in enumerate(picked):
            device = span.pos.device
            there = to_device(index, device), to_device(filled, device)
            part = kept_addresses(sharding.spans[rank], *there)
            spans.append(Span(*part.addresses()))
            place = sharding.index(rank, span.shape[0]).gather(1, index)
            places.append(place.masked_fill(~filled, -1))
        layouts = _layouts(torch.cat(places, 1), sharding.ranks)
        index, _ = picked[sharding.rank]
        return Selection(
            to_device(index, span.pos.device), sharded_from(spans, layouts, sharding.rank)
        )


def _layouts(places: Tensor, ranks: int) -> list[Layout]:
    """Returns a layout for each row of what the ranks hold.

    Args:
        places: [B, P m] place in the row of each token, rank by rank; -1 for padding.
    """
    counts = (places >= 0).sum(1)
    tokens = places.shape[1]
    if bool((counts == counts[0]).all()):
        # A convolution reads across pieces: no padding may stand between their tokens, and a layout
        # moves what lies behind its own to the end.
        tokens = int(counts[0])
        places = places.masked_fill(places < 0, torch.iinfo(torch.int64).max)
    order = places.argsort(dim=1, stable=True).argsort(1)
    found = []
    for row in order:
        runs = []
        for part in row.view(ranks, -1).tolist():
            runs.append(_runs(part))
        found.append(Layout(tuple(runs), tokens))
    return found


def _runs(index: list[int]) -> tuple[Interval, ...]:
    """Puts neighbours together."""
    runs: list[Interval] = []
    for place in index:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return tuple(runs)
