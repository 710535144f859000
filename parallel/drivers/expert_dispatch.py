"""Travel: tokens go to the ranks that hold their experts, and come back: an all-to-all of uneven
counts, twice.

Every rank exchanges, also one whose experts nobody chose, or whose tokens stay at home. What
travels is what was routed,
no padding: a rank sends W numbers for each visit to another rank's experts, and as many for each
visitor that it sends home.

Source: Lepikhin et al. 2020 (arXiv:2006.16668) for experts over ranks. Theirs sends slots of a
fixed capacity, ours what is there; the tokens keep the cut of their sequence, whatever it is.

Letters: N visits, W width, E experts, P ranks of the expert group, e = E / P experts of a rank, M
visitors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.primitives.expert_dispatch import ExpertDispatch, Visit
from parallel.collectives import Communicator, all_to_all_rows


class ExpertAllToAll(ExpertDispatch):
    """Stands in for a Dispatch whose experts lie over the ranks of `wire`: rank r holds experts r e
    to (r + 1) e."""

    def __init__(self, core: ExpertDispatch, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def exchange(
        self, sent: Tensor, counts: Tensor, visit: Visit, keys: Tensor | None = None
    ) -> Tensor:
        """As Dispatch.exchange; `visit` sees the visitors of all ranks, and the counts of this
        rank's experts."""
        ranks = self.communicator.size
        assert len(counts) % ranks == 0, "the config check sees to it that ranks divide the experts"
        e = len(counts) // ranks
        came = torch.stack(
            self.communicator.all_to_all(counts.split(e), [e] * ranks, "expert counts")
        )  # [P, e]
        given = counts.view(ranks, e).sum(1).tolist()
        taken = came.sum(1).tolist()
        arrived = all_to_all_rows(sent[: sum(given)], self.communicator, given, taken, "visits")
        order = _by_expert(came)
        if keys is not None:
            keys = torch.cat(
                self.communicator.all_to_all(keys[: sum(given)].split(given), taken, "visit keys")
            )[order]
        made = self.core.exchange(arrived[order], came.sum(0), visit, keys)
        back = all_to_all_rows(made[order.argsort()], self.communicator, taken, given, "returns")
        return torch.cat([back, back.new_zeros(len(sent) - sum(given), back.shape[1])])


def _by_expert(came: Tensor) -> Tensor:
    """[M]: the order that brings visitors, who lie rank by rank, to lie expert by expert."""
    ranks, e = came.shape
    expert = torch.arange(e, device=came.device).repeat(ranks).repeat_interleave(came.flatten())
    return expert.argsort(stable=True)


def sent_bytes(
    given: Sequence[int],
    taken: Sequence[int],
    rank: int,
    *,
    width: int,
    item: int,
    experts: int,
    keys: bool = False,
) -> dict[str, int]:
    """What `rank` sends in one layer, forward and backward, by name of the move.

    Args:
        given, taken: visits that this rank makes to each rank, and visitors that it has from each.
        width, item: numbers to a token, and bytes of one. experts: of the layer.
    """
    away = sum(given) - given[rank]
    guests = sum(taken) - taken[rank]
    ranks = len(given)
    moved = {"expert counts": 8 * experts // ranks * (ranks - 1)}
    moved |= {"visit keys": 8 * away} if keys else {}
    moved |= {"visits": away * width * item, "visits backward": guests * width * item}
    return moved | {"returns": guests * width * item, "returns backward": away * width * item}
