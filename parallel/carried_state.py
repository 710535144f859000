"""A Past over ranks: kept tokens are dealt out evenly, whichever ranks computed them; states stay
with their (row, head) pairs.

Letters: B rows, T tokens of a row, M tokens kept, m of them on each rank, P ranks, U (row, head)
pairs of a rank.
"""

import torch
from torch import Tensor

from models.carried_state import CarriedState
from models.span import Span, to_device
from parallel.collectives import Communicator
from parallel.layout import contiguous
from parallel.partition import unit_ranges
from parallel.sharding import SequenceSharding, shard_span


class ShardedCarriedState(CarriedState):
    """CarriedState of rows sharded over the ranks of `communicator`.

    Rank r keeps the r-th part of the M tokens of each lane. Kept tokens lie before every token of
    the row, so all queries see equally many of them and equal parts are balanced. One
    exchange a row moves them there, after the step.
    """

    def __init__(self, communicator: Communicator):
        super().__init__()
        self.communicator = communicator

    def _whole(self, row: Span) -> Span:
        cut: SequenceSharding = row.sharding
        return cut.whole.map(lambda t: t[:, : cut.layouts[0].tokens])

    def _share(self, length: int) -> int:
        return contiguous(length, self.communicator.size).tokens_per_rank

    def _dealt(self, span: Span) -> Span:
        return shard_span(
            span, [contiguous(span.shape[1], self.communicator.size)], self.communicator.rank
        )

    def _shift(self, old: Tensor, x: Tensor, row: Span, length: int) -> Tensor:
        rank, place = token_homes(row.sharding, length, old.shape[1])
        slots = torch.arange(length)
        rows = torch.arange(len(x))[:, None]
        to = (slots // old.shape[1]).expand_as(rank)
        me = self.communicator.rank
        here = torch.cat([old.flatten(0, 1), x.flatten(0, 1)])
        parts = [
            here[to_device(place[(to == r) & (rank == me)], x.device)]
            for r in range(self.communicator.size)
        ]
        target = rows * old.shape[1] + slots % old.shape[1]
        targets = [target[(to == me) & (rank == r)] for r in range(self.communicator.size)]
        each = x[0, 0].numel()
        came = self.communicator.all_to_all(parts, [len(t) * each for t in targets], "past")
        out = torch.zeros_like(old).flatten(0, 1)
        out[to_device(torch.cat(targets), x.device)] = torch.cat(came).view(-1, *x.shape[2:])
        return out.view_as(old)

    def _gathered(self, x: Tensor, length: int) -> Tensor:
        parts = self.communicator.all_to_all(
            [x] * self.communicator.size, [x.numel()] * self.communicator.size, "past gathered"
        )
        return torch.cat([part.view_as(x) for part in parts], 1)[:, :length]

    def _dealt_tokens(self, x: Tensor) -> Tensor:
        return (
            contiguous(x.shape[1], self.communicator.size)
            .shard(x.transpose(0, 1), self.communicator.rank, 0)
            .transpose(0, 1)
        )

    def _paired(self, state: Tensor) -> Tensor:
        number = torch.tensor([len(state)] * self.communicator.size, device=state.device)
        counts = [
            int(n)
            for n in torch.cat(
                self.communicator.all_to_all(
                    number.split(1), [1] * self.communicator.size, "past gathered"
                )
            )
        ]
        each = state.shape[1:].numel()
        parts = self.communicator.all_to_all(
            [state] * self.communicator.size, [n * each for n in counts], "past gathered"
        )
        return torch.cat(parts).view(sum(counts), *state.shape[1:]).unflatten(0, (self.rows, -1))

    def _dealt_states(self, state: Tensor) -> Tensor:
        first, last = unit_ranges(len(state), self.communicator.size)[self.communicator.rank]
        return state[first:last]


def token_homes(cut: SequenceSharding, length: int, each: int) -> tuple[Tensor, Tensor]:
    """Locates the last `length` tokens of (kept tokens, then the row).

    Returns:
        The rank, [B, length], and the position on that rank, [B, length].

    Args:
        each: m; a rank's kept tokens come before those of its part of the row, both flattened over
            (row, token).
    """
    rows = cut.whole.shape[0]
    tokens = cut.layouts[0].tokens
    held = cut.layouts[0].tokens_per_rank
    order = torch.stack([layout.order()[:tokens] for layout in cut.layouts]).expand(rows, -1)
    number = torch.arange(rows)[:, None]
    old = torch.arange(length).expand(rows, -1)
    rank = torch.cat([old // each, order // held], 1)
    place = torch.cat([number * each + old % each, rows * each + number * held + order % held], 1)
    return rank[:, tokens:], place[:, tokens:]
