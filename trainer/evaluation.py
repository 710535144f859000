"""Held-out loss, and what it is made of: the loss at each distance into a document, on the sharded model.

Letters: m rows of a micro-batch, c tokens of a row that this rank holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.loss import IGNORE
from trainer.data.stream import Stream
from trainer.share import Share

BUCKETS = 48  # positions 0, 1, 2 to 3, 4 to 7, ...: enough for any row


class Evaluated(NamedTuple):
    """Held-out loss in nats per token, how many tokens it was taken over, and the same by position.

    by_position: [{"begin", "end", "loss": nats, "tokens": how many}] over half-open ranges of positions in the document.
    """

    loss: float
    tokens: int
    by_position: list[dict[str, Any]]


def bucket(pos: Tensor) -> Tensor:
    """[...] int64: 0 for position 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return torch.where(pos > 0, pos.clamp_min(1).to(torch.float64).log2().floor().long() + 1, 0)


@torch.no_grad()
def evaluate(model: nn.Module, share: Share, stream: Stream, batches: int, stop: Callable[[], bool]) -> Evaluated | None:
    """The loss over the first `batches` held-out batches, the same on every rank; None when `stop` says so (all ranks)."""
    cursor = stream.start()
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=share.mesh.device)
    many = batches if stream.batches is None else min(batches, stream.batches)
    for _ in range(many):
        if stop():
            return None
        batch, cursor = stream.read(cursor)
        for piece, _ in share(batch):
            losses = model(piece.tokens, piece.span, piece.targets).to(torch.float64)
            valid = piece.targets != IGNORE
            where = bucket(piece.span.pos)[valid]
            sums[0].index_add_(0, where, losses[valid])
            sums[1].index_add_(0, where, torch.ones_like(losses[valid]))
    if share.mesh.world_group is not None:
        dist.all_reduce(sums, group=share.mesh.world_group)
    total, count = sums.cpu()
    found = [
        {"begin": 2**b // 2, "end": 2**b, "loss": float(total[b] / count[b]), "tokens": int(count[b])}
        for b in range(BUCKETS)
        if count[b]
    ]
    return Evaluated(float(total.sum() / count.sum().clamp_min(1)), int(count.sum()), found)
