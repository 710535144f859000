"""The use that a model makes of its context: loss late in a document, and without the far past."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import Tensor

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.ranges import Piece, Range, Share
from models.span import PADDING
from trainer.config.finding import Finding
from trainer.data.batch import Batch
from trainer.evaluation.base import (
    Evaluation,
    EvaluationContext,
    Every,
    Figure,
    RunFacts,
    on_device,
)


class InContext(Evaluation):
    """Compares losses at two positions, and losses with and without the far past.

    Figures: `gain`, the loss of the token at `late` less that of the token at `early`, below 0
    where the context helps. `used`, the least share of the context whose loss is within `slack` of
    that of the whole context; and in its cells the loss for each share.

    The last tokens of every held-out row are predicted from fewer and fewer tokens before them: a
    row is cut to its last half, quarter, and so on, so that attention and states lack the rest.

    Args:
        early, late: indices of tokens in their document; a row holds more than `late`.
        shares: of the row that is read, descending from 1.
        slack: nats per token.
        batches: of held-out data to read at most; None = evaluation.batches.
        every: as in Evaluation.

    Source: the in-context score of Olsson et al. 2022 (arXiv:2209.11895), with its 50th and 500th
    token; the cut as in Khandelwal et al. 2018 (arXiv:1805.04623).
    """

    def __init__(
        self,
        *,
        early: Piece = 50,
        late: Piece = 500,
        shares: list[Share] = [1.0, 0.5, 0.25, 0.125],  # noqa: B006 - never written to
        slack: Annotated[float, Range(0.0, 100.0)] = 0.01,
        batches: Piece | None = None,
        every: Every = None,
    ):
        super().__init__(every=every)
        if early >= late:
            raise ValueError(f"early={early} must be below late={late}; use a larger late")
        if not shares or shares[0] != 1 or sorted(set(shares), reverse=True) != list(shares):
            raise ValueError("shares must begin with 1 and descend, as [1.0,0.5,0.25]")
        self.early = early
        self.late = late
        self.shares = shares
        self.slack = slack
        self.batches = batches

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        tokens = facts.config.context_length
        if self.late >= tokens:
            yield Finding(
                facts.key("late"),
                self.late,
                f"a row holds the tokens 0 to {tokens - 1}",
                f"use {facts.key('late')}={tokens - 1} or a larger context_length",
            )
        if tokens * self.shares[-1] < 2:
            yield Finding(
                facts.key("shares"),
                self.shares,
                f"the smallest leaves fewer than 2 of {tokens} tokens",
                "use larger shares",
            )

    @torch.no_grad()
    def run(self, context: EvaluationContext) -> list[Figure]:
        stream = context.stream
        tokens = context.config.context_length
        kept = [max(2, round(share * tokens)) for share in self.shares]
        # Half of the shortest cut: each of these has some context in every cut.
        scored = max(1, kept[-1] // 2)
        sums = on_device(context, 2, len(kept) + 2)
        cursor = stream.start()
        limit = self.batches or context.config.evaluation.batches
        batches = limit if stream.batches is None else min(limit, stream.batches)
        for _ in range(batches):
            batch, cursor = stream.read(cursor)
            for index, length in enumerate(kept):
                piece = _last(batch, length, scored)
                for micro_batch in context.pieces(piece, "the end of held-out rows"):
                    losses = context.model(micro_batch)
                    valid = micro_batch.targets != IGNORE
                    sums[0, index] += losses[valid].sum()
                    sums[1, index] += valid.sum()
            for micro_batch in context.pieces(batch, "a held-out batch"):
                losses = _losses(context, micro_batch)
                for offset, position in enumerate((self.early, self.late)):
                    chosen = (micro_batch.targets != IGNORE) & (micro_batch.span.pos == position)
                    sums[0, len(kept) + offset] += losses[chosen].sum()
                    sums[1, len(kept) + offset] += chosen.sum()
        totals, counts = context.total(sums)
        losses_by_cut = (totals / counts).tolist()
        if not counts[0]:
            return []
        cells = self._cells(losses_by_cut, counts.tolist(), kept)
        figures = [Figure("used", self._used(losses_by_cut), None, cells)]
        if counts[-1] and counts[-2]:
            gain = losses_by_cut[-1] - losses_by_cut[-2]
            figures.insert(0, Figure("gain", gain, 0.0))
        return figures

    def _cells(
        self, losses: list[float], counts: list[float], kept: list[int]
    ) -> list[dict[str, Any]]:
        cells = []
        for share, length, loss, count in zip(self.shares, kept, losses, counts):
            cells.append({"share": share, "length": length, "loss": loss, "tokens": int(count)})
        return cells

    def _used(self, losses: list[float]) -> float:
        """Returns the least share of the context that is as good as the whole."""
        used = self.shares[0]
        for share, loss in zip(self.shares, losses):
            if loss > losses[0] + self.slack:
                break
            used = share
        return used


def _losses(context: EvaluationContext, micro_batch: MicroBatch) -> Tensor:
    """Returns the losses of a micro-batch, float64, 0 where there is no target."""
    return context.model(micro_batch).double()


def _last(batch: Batch, length: int, scored: int) -> Batch:
    """Returns the last tokens of every row as rows of their own, of which the last are predicted.

    Positions of a document that is cut begin anew.
    """
    tokens = batch.tokens[:, -(length + 1) :]
    doc = batch.doc[:, -(length + 1) :]
    pos = batch.pos[:, -(length + 1) :]
    role = batch.role[:, -(length + 1) :]
    is_first = (doc == doc[:, :1]) & (doc != PADDING)
    pos = torch.where(is_first, pos - pos[:, :1], pos)
    aims = batch.targets()[:, -length:].clone()
    aims[:, :-scored] = IGNORE
    # As in every Batch, one token more than is read, which is no target of its own.
    aims = torch.cat([aims, torch.full_like(aims[:, :1], IGNORE)], 1)
    return Batch(tokens, doc, pos, role, aims, batch.source)
