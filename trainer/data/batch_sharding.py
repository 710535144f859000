"""Which rows of a batch a rank computes, and which of their tokens: the only place where a batch is
cut.

Rows go to data ranks in stretches, tokens to context ranks by the layout. Every rank does the same
number of micro-batches of the same size; where rows do not divide, rows of padding fill up.

Letters: R rows of the step, T context length, m rows of a micro-batch, c tokens of a row that this
rank holds.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import PREFIX, Span
from parallel.layout import layouts
from parallel.mesh import Mesh
from parallel.sharding import shard_span
from trainer.data.batch import Batch

AUTO_TOKENS = {
    "cpu": 8192,
    "cuda": 32768,
}  # tokens that a rank computes at once under parallel.micro_batch=auto


class MicroBatch(NamedTuple):
    """A micro-batch as this rank sees it: tokens, addresses and targets, all [m, c]."""

    tokens: Tensor
    span: Span
    targets: Tensor


class BatchSharder:
    """Cuts batches for one rank.

    Args:
        mesh: the ranks.
        rows: R, in every step.
        context_length: T.
        micro_batch: rows that a rank computes at once, or "auto": as many as AUTO_TOKENS allows.
        policy: name of the layout.
        prefix: first tokens of each document that the model sees at once (a prefix-LM): they are
            nobody's targets.
    """

    def __init__(
        self,
        mesh: Mesh,
        *,
        rows: int,
        context_length: int,
        micro_batch: int | str,
        policy: str,
        prefix: int = 0,
    ):
        self.mesh = mesh
        self.policy = policy
        self.prefix = prefix
        self.each = -(-rows // mesh.data.size)
        held = -(-context_length // mesh.context.size)
        fits = max(1, AUTO_TOKENS.get(mesh.device.type, AUTO_TOKENS["cuda"]) // held)
        self.micro_batch = min(self.each, fits if micro_batch == "auto" else int(micro_batch))
        self.pieces = -(-self.each // self.micro_batch)

    def __call__(self, batch: Batch) -> Iterator[tuple[MicroBatch, bool]]:
        """This rank's micro-batches, and whether each is the last."""
        first = self.mesh.data.rank * self.each
        mine = batch.numbered().part(first, first + self.each)
        for number in range(self.pieces):
            start = number * self.micro_batch
            yield self.piece(mine.part(start, start + self.micro_batch)), number == self.pieces - 1

    def targets(self, batch: Batch) -> Tensor:
        """[R, T] int64: the batch's targets, IGNORE also where the next token is in plain sight."""
        if batch.aims is not None:  # what is to be said is no token of the row
            return batch.targets()
        seen = (batch.pos[:, 1:] < self.prefix) | (batch.role[:, 1:] == PREFIX)
        return torch.where(seen, IGNORE, batch.targets())

    def valid(self, batch: Batch) -> int:
        """How many tokens of a whole batch are predicted, over all ranks."""
        return int((self.targets(batch) != IGNORE).sum())

    def piece(self, batch: Batch) -> MicroBatch:
        """All rows of a batch, cut over the context ranks."""
        device = self.mesh.device
        span = batch.span()
        tokens = batch.inputs().to(device)
        targets = self.targets(batch).to(device)
        span = span.map(lambda t: t.to(device))
        if self.mesh.context.size == 1:
            return MicroBatch(tokens, span, targets)
        rows = layouts(
            self.policy, batch.span(), self.mesh.context.size, heads=self.mesh.ulysses.size
        )
        here = shard_span(span, rows, self.mesh.context.rank)
        return MicroBatch(
            here.sharding.shard(tokens, 0), here, here.sharding.shard(targets, IGNORE)
        )

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"each of {self.mesh.data.size} data ranks computes {self.each} rows a step,"
            f" {self.micro_batch} at once; each row is shared by {self.mesh.context.size} context"
            f" ranks ({self.policy})"
        )


def single_row(tokens: list[int], device: torch.device) -> Batch:
    """One row that is one document, for generation: a Batch whose last token has no target."""
    row = torch.tensor([[*tokens, 0]])
    pos = torch.arange(row.shape[1])[None]
    doc = torch.zeros_like(row)
    doc[:, -1] = -1
    return Batch(row, doc, pos, torch.zeros_like(row))
