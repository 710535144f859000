"""All-to-all driver of ExpertDispatch: sends tokens to the ranks of their experts and back.

Every rank takes part in both exchanges, also one whose experts no token chose or whose tokens stay
local. Only routed tokens travel, without padding: a rank sends W numbers for each visit to another
rank's experts, and as many for each visitor that it sends home.

Source: Lepikhin et al. 2020 (arXiv:2006.16668) for experts over ranks. Theirs sends slots of a
fixed capacity, ours uneven counts; tokens keep the sharding of their sequence.

Letters: N visits, W width, E experts, P ranks of the expert group, e = E / P experts of a rank, M
visitors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.primitives.expert_dispatch import ExpertDispatch, Visit
from parallel.collectives import Communicator, all_to_all_rows


class ExpertAllToAll(ExpertDispatch):
    """Replaces an ExpertDispatch whose experts are sharded over the ranks of `communicator`.

    Rank r holds experts r e to (r + 1) e.
    """

    def __init__(self, core: ExpertDispatch, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def exchange(
        self, sent: Tensor, counts: Tensor, visit: Visit, keys: Tensor | None = None
    ) -> Tensor:
        """Runs ExpertDispatch.exchange over the ranks.

        `visit` receives the visitors of all ranks and the counts of this rank's experts.
        """
        communicator = self.communicator
        ranks = communicator.size
        assert len(counts) % ranks == 0, "the config check sees to it that ranks divide the experts"
        local_experts = len(counts) // ranks
        count_parts = communicator.all_to_all(
            counts.split(local_experts), [local_experts] * ranks, "expert counts"
        )
        visitor_counts = torch.stack(count_parts)  # [P, e]
        given = counts.view(ranks, local_experts).sum(1).tolist()
        taken = visitor_counts.sum(1).tolist()
        # What lies behind the counted visits was dropped by the router and stays local.
        visits = sum(given)
        arrived = all_to_all_rows(sent[:visits], communicator, given, taken, "visits")
        order = _expert_order(visitor_counts)
        if keys is not None:
            key_parts = communicator.all_to_all(keys[:visits].split(given), taken, "visit keys")
            keys = torch.cat(key_parts)[order]
        outputs = self.core.exchange(arrived[order], visitor_counts.sum(0), visit, keys)
        returned = all_to_all_rows(outputs[order.argsort()], communicator, taken, given, "returns")
        dropped = returned.new_zeros(len(sent) - visits, returned.shape[1])
        return torch.cat([returned, dropped])


def _expert_order(visitor_counts: Tensor) -> Tensor:
    """Returns [M], the order that sorts visitors from rank by rank to expert by expert."""
    ranks, experts = visitor_counts.shape
    expert = torch.arange(experts, device=visitor_counts.device).repeat(ranks)
    expert = expert.repeat_interleave(visitor_counts.flatten())
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
    """Returns the bytes that `rank` sends in one layer, forward and backward, by name of the move.

    Args:
        given, taken: visits that this rank makes to each rank, and visitors that it has from each.
        width: numbers per token.
        item: bytes per number.
        experts: experts of the layer.
        keys: each visit carries an int64 key.
    """
    outgoing = sum(given) - given[rank]
    visitors = sum(taken) - taken[rank]
    ranks = len(given)
    sizes = {"expert counts": 8 * experts // ranks * (ranks - 1)}
    if keys:
        sizes["visit keys"] = 8 * outgoing
    sizes["visits"] = outgoing * width * item
    sizes["visits backward"] = visitors * width * item
    sizes["returns"] = visitors * width * item
    sizes["returns backward"] = outgoing * width * item
    return sizes
