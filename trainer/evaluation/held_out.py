"""Held-out loss, and what it is made of: the loss at each distance into a document, and grades of a
task; on the sharded model.

Letters: m rows of a micro-batch, c tokens of a row that this rank holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.loss import IGNORE
from trainer.agreement import mark
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.data.tasks.base import Grades, SyntheticTask

BUCKETS = 48  # positions 0, 1, 2 to 3, 4 to 7, ...: enough for any row


class HeldOutResult(NamedTuple):
    """Held-out loss in nats per token, how many tokens it was taken over, and the same by position.

    loss: None where there was nothing to predict: that is no figure.
    by_position: [{"begin", "end", "loss": nats, "tokens": how many}] over half-open ranges of
    positions in the document.
    graded: {name: share}, how a task grades what the model finds likeliest at each target; empty
    where the data is no task.
    """

    loss: float | None
    tokens: int
    by_position: list[dict[str, Any]]
    graded: dict[str, float] = {}  # never written to


def position_bucket(pos: Tensor) -> Tensor:
    """[...] int64: 0 for position 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    return torch.where(pos > 0, pos.clamp_min(1).to(torch.float64).log2().floor().long() + 1, 0)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    share: BatchSharder,
    stream: Stream,
    batches: int,
    stop: Callable[[int, str], bool],
    lanes: Lanes | None = None,
) -> HeldOutResult | None:
    """The loss over the first `batches` held-out batches, the same on every rank; None when `stop`
    says so (all ranks).

    Args:
        stop: as Stop.asked: is told the mark of each batch, and what it is.
        lanes: new ones, where batches go on from one another.
    """
    cursor = stream.start()
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=share.mesh.device)
    task: SyntheticTask | None = getattr(stream, "task", None)
    grades: Grades = {}
    many = batches if stream.batches is None else min(batches, stream.batches)
    for turn in range(many):
        batch, cursor = stream.read(cursor)
        if stop(mark(batch, stream.fingerprint), f"held-out batch {turn + 1}"):
            return None
        for number, (piece, _) in enumerate(share(batch)):
            span = piece.span if lanes is None else lanes.attach(number, piece.span)
            losses = model(piece.tokens, span, piece.targets).to(torch.float64)
            valid = piece.targets != IGNORE
            if task is not None:
                said = model(piece.tokens, span).argmax(-1)
                grades = _added(
                    grades,
                    task.grade(said[valid].cpu().numpy(), piece.targets[valid].cpu().numpy()),
                )
            if lanes is not None:
                lanes.advance(number)
            where = position_bucket(piece.span.pos)[valid]
            sums[0].index_add_(0, where, losses[valid])
            sums[1].index_add_(0, where, torch.ones_like(losses[valid]))
    if share.mesh.world.group is not None:
        dist.all_reduce(sums, group=share.mesh.world.group)
    total, count = sums.cpu()
    found = [
        {
            "begin": 2**b // 2,
            "end": 2**b,
            "loss": float(total[b] / count[b]),
            "tokens": int(count[b]),
        }
        for b in range(BUCKETS)
        if count[b]
    ]
    graded = _shares(grades, share)
    tokens = int(count.sum())
    return HeldOutResult(float(total.sum() / tokens) if tokens else None, tokens, found, graded)


def _added(a: Grades, b: Grades) -> Grades:
    """Counts of two lots of targets together."""
    return {
        name: (many + a.get(name, (0, 0))[0], kv_span + a.get(name, (0, 0))[1])
        for name, (many, kv_span) in b.items()
    }


def _shares(grades: Grades, share: BatchSharder) -> dict[str, float]:
    """What was counted, over all ranks, as shares of 1; the names are the same on every rank. A
    share of nothing is none."""
    counts = torch.tensor(
        [grades[name] for name in sorted(grades)], dtype=torch.float64, device=share.mesh.device
    )
    if share.mesh.world.group is not None and len(counts):
        dist.all_reduce(counts, group=share.mesh.world.group)
    return {
        name: many / kv_span
        for name, (many, kv_span) in zip(sorted(grades), counts.tolist())
        if kv_span
    }
