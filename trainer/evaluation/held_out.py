"""Held-out loss of the sharded model, in total, by position in the document, and grades of a task.

Letters: m rows of a micro-batch, c tokens of a row on this rank.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.ranges import Piece
from trainer.agreement import mark
from trainer.config.finding import Finding
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes, in_pieces
from trainer.data.open import open_stream
from trainer.data.sources.base import Source, build_source
from trainer.data.streams.base import Stream
from trainer.data.tasks.base import Grades, SyntheticTask
from trainer.evaluation.base import (
    Evaluation,
    EvaluationContext,
    Every,
    Figure,
    Interrupted,
    RunFacts,
    uniform_loss,
)
from trainer.objectives.stream import ObjectiveStream, objective_of

LOSS = "held_out_loss"
BUCKETS = 48  # positions 0, 1, 2 to 3, 4 to 7, ...: enough for any row


class HeldOutResult(NamedTuple):
    """Result of an evaluation.

    Attributes:
        loss: in nats per token; None where there was nothing to predict.
        tokens: number of targets.
        by_position: [{"begin", "end", "loss": nats, "tokens": count}] over half-open ranges of
            positions in the document.
        graded: {name: share}, a task's grades of the model's likeliest token at each target; empty
            where the data is not a task.
    """

    loss: float | None
    tokens: int
    by_position: list[dict[str, Any]]
    graded: dict[str, float] = {}  # never written to


class HeldOut(Evaluation):
    """Loss over held-out batches, and the grades of data that is a task.

    Args:
        data: a source of its own, such as another domain; None = the held-out data of the run.
            Where it holds nothing out, all of its documents count.
        length: tokens in a row; None = as in training.
        batches: to read at most; None = evaluation.batches.
        every: as in Evaluation.
    """

    needs_next_token = False
    reads_source = True

    def __init__(
        self,
        *,
        data: Source | None = None,
        length: Piece | None = None,
        batches: Piece | None = None,
        every: Every = None,
    ):
        super().__init__(every=every)
        self.data = data
        self.length = length
        self.batches = batches
        self._stream: Stream | None = None

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        yield from check_rows(facts, self.data, self.length)

    def run(self, context: EvaluationContext) -> list[Figure]:
        stream = self.opened(context)
        share = context.share
        if self.length is not None:
            share = context.sharder(context.config.rows, self.length)
        batches = self.batches or context.config.evaluation.batches
        lanes = context.lanes(share)
        result = evaluate(context.model, share, stream, batches, context.stopped, lanes)
        if result is None:
            raise Interrupted
        if result.loss is None:
            return []
        chance = uniform_loss(context.vocabulary)
        figures = [Figure(LOSS, result.loss, chance, result.by_position)]
        for name, value in result.graded.items():
            figures.append(Figure(name, value))
        for name, source in stream.by_source.items():
            part = evaluate(
                context.model, share, source, batches, context.stopped, context.lanes(share)
            )
            if part is None:
                raise Interrupted
            if part.loss is not None:
                figures.append(Figure(f"{LOSS}/{name}", part.loss, chance, part.by_position))
        return figures

    def opened(self, context: EvaluationContext) -> Stream:
        """Returns the rows to read, opened once for all evaluations of a run."""
        if self._stream is None:
            self._stream = held_out_rows(context, self.data, self.length)
        return self._stream


def check_rows(facts: RunFacts, data: Source | None, length: int | None) -> Iterator[Finding]:
    """Checks an evaluation's own data and its own length of rows."""
    if length is not None:
        yield from facts.check_length("length", length, length)
    if data is None:
        return
    yield from facts.check_streams("data", data)
    try:
        tokenizer = data.tokenizer()
    except ValueError as error:
        yield Finding(sentence=f"{facts.key('data')}: {error}")
        return
    known = facts.tokenizer.vocabulary
    if tokenizer.vocabulary > facts.vocabulary or (
        not isinstance(data, SyntheticTask) and tokenizer.fingerprint != facts.tokenizer.fingerprint
    ):
        yield Finding(
            facts.key("data"),
            type(data).__name__,
            f"its tokens are not those of the run's data ({tokenizer.vocabulary} tokens, the run's"
            f" data has {known} and the model {facts.vocabulary})",
            "give both the same tokenizer",
        )


def held_out_rows(context: EvaluationContext, data: Source | None, length: int | None) -> Stream:
    """Opens rows of another source or another length; the run's own where neither is given."""
    if data is None and length is None:
        return context.stream
    config: Config = context.config
    source = data
    if source is None:
        source = build_source(as_node(config.data))
    objective = objective_of(config)
    tokens = length or config.context_length
    text = open_stream(
        source,
        context_length=objective.reads(tokens),
        rows=config.rows,
        # Of the order of documents, which is to be the same under every seed of a run.
        seed=0,
        split="held_out" if source.holds_out else "train",
        lanes=config.memory.carries,
    )
    if not objective.rewrites:
        return text
    return ObjectiveStream(text, objective, context_length=tokens, seed=0)


def position_bucket(pos: Tensor) -> Tensor:
    """Returns [...] int64: 0 for position 0, 1 for 1, 2 for 2 and 3, 3 for 4 to 7, and so on."""
    # In float64: float32 would round log2(2**k - 1) up to k at large positions.
    logarithm = pos.clamp_min(1).to(torch.float64).log2().floor().long()
    return torch.where(pos > 0, logarithm + 1, 0)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    share: BatchSharder,
    stream: Stream,
    batches: int,
    stop: Callable[[int, str], bool],
    lanes: Lanes | None = None,
) -> HeldOutResult | None:
    """Computes the loss over the first held-out batches, the same on every rank.

    Args:
        model: in evaluation mode.
        share: cuts batches for this rank.
        stream: held-out data.
        batches: number of batches to read at most.
        stop: collective; receives the mark of each batch and its description, and returns True to
            interrupt.
        lanes: new ones, where batches continue one another.

    Returns:
        The result; None where `stop` interrupted it, on all ranks.
    """
    cursor = stream.start()
    # Row 0 sums losses, row 1 counts targets, by bucket.
    sums = torch.zeros(2, BUCKETS, dtype=torch.float64, device=share.mesh.device)
    task: SyntheticTask | None = getattr(stream, "task", None)
    grades: Grades = {}
    batch_count = batches if stream.batches is None else min(batches, stream.batches)
    for batch_index in range(batch_count):
        batch, cursor = stream.read(cursor)
        if stop(mark(batch, stream.fingerprint), f"held-out batch {batch_index + 1}"):
            return None
        for micro_batch in in_pieces(share, batch, lanes, advance=task is None):
            losses = model(micro_batch).to(torch.float64)
            valid = _targets(micro_batch) != IGNORE
            buckets = position_bucket(micro_batch.span.pos)[valid]
            sums[0].index_add_(0, buckets, losses[valid])
            sums[1].index_add_(0, buckets, torch.ones_like(losses[valid]))
        if task is None:
            continue
        # A second forward pass: with targets, the model returns losses and no logits.
        for micro_batch in in_pieces(share, batch, lanes):
            predicted = model(micro_batch.without_targets()).argmax(-1)
            targets = _targets(micro_batch)
            valid = targets != IGNORE
            new_grades = task.grade(predicted[valid].cpu().numpy(), targets[valid].cpu().numpy())
            grades = _added(grades, new_grades)
    if share.mesh.world.group is not None:
        dist.all_reduce(sums, group=share.mesh.world.group)
    totals, counts = sums.cpu()
    tokens = int(counts.sum())
    loss = float(totals.sum() / tokens) if tokens else None
    return HeldOutResult(loss, tokens, _by_position(totals, counts), _graded(grades, share))


def _targets(micro_batch: MicroBatch) -> Tensor:
    assert micro_batch.targets is not None, "held-out rows come with targets"
    return micro_batch.targets


def _by_position(totals: Tensor, counts: Tensor) -> list[dict[str, Any]]:
    """Lists the mean loss of every bucket that has targets."""
    rows = []
    for bucket in range(BUCKETS):
        if counts[bucket]:
            rows.append(
                {
                    "begin": 2**bucket // 2,
                    "end": 2**bucket,
                    "loss": float(totals[bucket] / counts[bucket]),
                    "tokens": int(counts[bucket]),
                }
            )
    return rows


def _added(before: Grades, new: Grades) -> Grades:
    """Adds up the counts (right, all) of two sets of targets, by the names of the new ones."""
    sums: Grades = {}
    for name, (right, total) in new.items():
        right_before, total_before = before.get(name, (0, 0))
        sums[name] = (right + right_before, total + total_before)
    return sums


def _graded(grades: Grades, share: BatchSharder) -> dict[str, float]:
    """Returns counts over all ranks as shares of 1, without those of nothing."""
    # Every rank has the same names; sorted, so that they also have the same order.
    names = sorted(grades)
    counts = torch.tensor(
        [grades[name] for name in names], dtype=torch.float64, device=share.mesh.device
    )
    if share.mesh.world.group is not None and len(counts):
        dist.all_reduce(counts, group=share.mesh.world.group)
    shares: dict[str, float] = {}
    for name, (right, total) in zip(names, counts.tolist()):
        if total:
            shares[name] = right / total
    return shares
