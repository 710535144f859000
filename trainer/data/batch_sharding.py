"""The rows and tokens of a batch that one rank computes; nothing else cuts a batch.

Rows go to data ranks in contiguous blocks, tokens to context ranks by the layout. Every rank
computes the same number of micro-batches of the same size; rows of padding fill up where the rows
do not divide evenly.

Letters: R rows of the step, T context length, m rows of a micro-batch, c tokens of a row on this
rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import PREFIX, Span, to_device
from parallel.layout import layouts
from parallel.mesh import Mesh
from parallel.sharding import moved, shard_span
from trainer.data.batch import Batch

# Tokens that a rank computes at once under parallel.micro_batch=auto.
AUTO_TOKENS = {"cpu": 8192, "cuda": 32768}


class BatchSharder:
    """Cuts batches for one rank.

    Args:
        mesh: the ranks.
        rows: R, in every step.
        context_length: T.
        micro_batch: rows that a rank computes at once, or "auto": as many as AUTO_TOKENS allows.
        policy: name of the layout.
        prefix: number of first tokens of each document that the model sees at once (a prefix-LM);
            they are never targets.
        time: pieces of a row that are computed one after another.

    Attributes:
        rows_per_rank: rows of a data rank in a step, padding included.
        piece_tokens: tokens of a row that are computed at once, over all ranks.
        tokens_per_rank: those of a rank, without padding.
        micro_batch: rows that a rank computes at once.
        pieces: number of micro-batches in a step.
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
        time: int = 1,
    ):
        self.mesh = mesh
        self.policy = policy
        self.prefix = prefix
        self.time = time
        # Negated floor division rounds up.
        self.rows_per_rank = -(-rows // mesh.data.size)
        self.piece_tokens = -(-context_length // time)
        self.tokens_per_rank = -(-context_length // (mesh.context.size * time))
        if micro_batch == "auto":
            limit = AUTO_TOKENS.get(mesh.device.type, AUTO_TOKENS["cuda"])
            wanted_rows = max(1, limit // self.tokens_per_rank)
        else:
            wanted_rows = int(micro_batch)
        self.micro_batch = min(self.rows_per_rank, wanted_rows)
        self.pieces = -(-self.rows_per_rank // self.micro_batch)

    def __call__(self, batch: Batch) -> Iterator[tuple[MicroBatch, bool]]:
        """Yields this rank's micro-batches, each with True if it is the last of the step."""
        for rows, last in self._micro_batches(self._own_rows(batch)):
            yield self.piece(rows), last

    def in_time(self, batch: Batch) -> Iterator[tuple[list[MicroBatch], bool]]:
        """Yields the same, each micro-batch as the pieces of its rows, in order."""
        return self.own_in_time(self._own_rows(batch))

    def own_in_time(self, own_rows: Batch) -> Iterator[tuple[list[MicroBatch], bool]]:
        """Yields what `in_time` does of this rank's rows, numbered over the whole step already."""
        for rows, last in self._micro_batches(own_rows):
            yield self._cut(rows), last

    @property
    def own(self) -> tuple[int, int]:
        """First row of this data rank in the batch, and the one behind its last."""
        first = self.mesh.data.rank * self.rows_per_rank
        return first, first + self.rows_per_rank

    def _own_rows(self, batch: Batch) -> Batch:
        # Numbered over the whole batch before the cut: an address then means the same token on
        # every rank.
        return batch.numbered().part(*self.own)

    def _micro_batches(self, own_rows: Batch) -> Iterator[tuple[Batch, bool]]:
        """Yields the rows of each micro-batch, with True for those of the last."""
        for number in range(self.pieces):
            start = number * self.micro_batch
            rows = own_rows.part(start, start + self.micro_batch)
            yield rows, number == self.pieces - 1

    def targets(self, batch: Batch) -> Tensor:
        """Returns the batch's targets, [R, T] int64, without tokens that the model sees already."""
        # An aim is no token of the row, so seeing the row does not reveal it.
        if batch.aims is not None:
            return batch.targets()
        next_is_visible = (batch.pos[:, 1:] < self.prefix) | (batch.role[:, 1:] == PREFIX)
        return torch.where(next_is_visible, IGNORE, batch.targets())

    def valid(self, batch: Batch) -> int:
        """Counts the targets of a batch, or of the rows of one that are given."""
        return int((self.targets(batch) != IGNORE).sum())

    def piece(self, batch: Batch) -> MicroBatch:
        """Returns this rank's tokens of all rows of a batch, on its device."""
        micro_batch = self._shard(batch.inputs(), batch.span(), self.targets(batch))
        return micro_batch._replace(source=self._source(batch))

    def _source(self, batch: Batch) -> MicroBatch | None:
        """Returns this rank's tokens of the source, which is shared by a layout of its own."""
        if batch.source is None:
            return None
        return self._shard(batch.source.inputs(), batch.source.span(), None)

    def _cut(self, batch: Batch) -> list[MicroBatch]:
        """Returns this rank's tokens of each piece of all rows of a batch."""
        tokens = batch.inputs()
        targets = self.targets(batch)
        span = batch.span()
        count = min(self.time, tokens.shape[1])
        pieces = []
        for number in range(count):
            start = number * tokens.shape[1] // count
            stop = (number + 1) * tokens.shape[1] // count
            part = span.map(lambda field, start=start, stop=stop: field[:, start:stop])
            pieces.append(self._shard(tokens[:, start:stop], part, targets[:, start:stop]))
        if count == 1:
            pieces[0] = pieces[0]._replace(source=self._source(batch))
        return pieces

    def _shard(self, tokens: Tensor, addresses: Span, targets: Tensor | None) -> MicroBatch:
        """Returns this rank's part of these tokens, on its device."""
        # Cut on the CPU: every rank plans for all of them there, and a device would have to be
        # waited for.
        if self.mesh.context.size > 1:
            rank_layouts = layouts(
                self.policy, addresses, self.mesh.context.size, heads=self.mesh.ulysses.size
            )
            addresses = shard_span(addresses, rank_layouts, self.mesh.context.rank)
            sharding = addresses.sharding
            tokens = sharding.shard(tokens, 0)
            targets = None if targets is None else sharding.shard(targets, IGNORE)
        device = self.mesh.device

        def move(tensor: Tensor) -> Tensor:
            return to_device(tensor, device)

        return MicroBatch(
            move(tokens), moved(addresses, move), None if targets is None else move(targets)
        )

    def describe(self) -> str:
        """Returns one line for the log."""
        return (
            f"each of {self.mesh.data.size} data ranks computes {self.rows_per_rank} rows a step,"
            f" {self.micro_batch} at once; each row is shared by {self.mesh.context.size} context"
            f" ranks ({self.policy})"
            + (f" and cut into {self.time} pieces in time" if self.time > 1 else "")
        )


def single_row(tokens: list[int], device: torch.device) -> Batch:
    """Returns a batch of one row that is one document, for generation.

    The last token has no target: a token of padding follows it.
    """
    row = torch.tensor([[*tokens, 0]])
    pos = torch.arange(row.shape[1])[None]
    doc = torch.zeros_like(row)
    doc[:, -1] = -1
    return Batch(row, doc, pos, torch.zeros_like(row))
