"""Held-out loss by position in the document, in ranges of equal width, at any length of rows."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from models.loss import IGNORE
from models.ranges import Piece
from trainer.config.finding import Finding
from trainer.data.lanes import in_pieces
from trainer.data.sources.base import Source
from trainer.data.streams.base import Stream
from trainer.evaluation.base import (
    Evaluation,
    EvaluationContext,
    Every,
    Figure,
    RunFacts,
    on_device,
    uniform_loss,
)
from trainer.evaluation.held_out import check_rows, held_out_rows


class ByPosition(Evaluation):
    """Loss over positions: how long a context still helps, beyond the trained length too.

    Args:
        data: a source of its own; None = the held-out data of the run.
        length: tokens of a row; None = the context length.
        width: positions of a range; None = a sixteenth of a row.
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
        width: Piece | None = None,
        batches: Piece | None = None,
        every: Every = None,
    ):
        super().__init__(every=every)
        self.data = data
        self.length = length
        self.width = width
        self.batches = batches
        self._stream: Stream | None = None

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        yield from check_rows(facts, self.data, self.length)

    @torch.no_grad()
    def run(self, context: EvaluationContext) -> list[Figure]:
        if self._stream is None:
            self._stream = held_out_rows(context, self.data, self.length)
        stream = self._stream
        tokens = self.length or context.config.context_length
        width = self.width or -(-tokens // 16)
        share = context.share
        if self.length is not None:
            share = context.sharder(context.config.rows, self.length)
        lanes = context.lanes(share)
        # Row 0 sums losses, row 1 counts targets; positions beyond the last range, which only a
        # document has that goes on from row to row, are left out.
        sums = on_device(context, 2, -(-tokens // width))
        cursor = stream.start()
        limit = self.batches or context.config.evaluation.batches
        batches = limit if stream.batches is None else min(limit, stream.batches)
        for _ in range(batches):
            batch, cursor = stream.read(cursor)
            context.check_signal(batch, "held-out batch by position")
            for micro_batch in in_pieces(share, batch, lanes):
                losses = context.model(micro_batch)
                is_counted = (micro_batch.targets != IGNORE) & (micro_batch.span.pos < tokens)
                index = micro_batch.span.pos[is_counted] // width
                sums[0].index_add_(0, index, losses[is_counted].to(torch.float64))
                sums[1].index_add_(0, index, torch.ones_like(index, dtype=torch.float64))
        totals, counts = context.total(sums)
        if not counts.any():
            return []
        cells = _cells(totals, counts, width)
        loss = float(totals.sum() / counts.sum())
        return [
            Figure("loss", loss, uniform_loss(context.vocabulary), cells),
            Figure("last_range", cells[-1]["loss"]),
        ]


def _cells(totals: Tensor, counts: Tensor, width: int) -> list[dict[str, Any]]:
    cells = []
    for index in range(len(counts)):
        if counts[index]:
            cells.append(
                {
                    "begin": index * width,
                    "end": (index + 1) * width,
                    "loss": float(totals[index] / counts[index]),
                    "tokens": int(counts[index]),
                }
            )
    return cells
