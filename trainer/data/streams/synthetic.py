"""Batches of a synthetic task: examples are a pure function of (seed, split, row number, settings).

A *stretch* is the smallest number of rows of a lane that any example fits in: one, unless `lanes`
lets an example continue in the next row.

Letters: R rows of a batch, T context length.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.loss import IGNORE
from models.span import GIVEN, PADDING, TEXT
from trainer.data.batch import Batch
from trainer.data.errors import NONE_HELD_OUT, DataError
from trainer.data.split import digest
from trainer.data.streams.base import Cursor, OwnRows, StreamOfRows
from trainer.data.tasks.base import Example, SyntheticTask
from trainer.errors import BAD_CONFIG

NO_TOKENS = np.zeros(0, np.int64)
DRAWS = 20_000  # examples drawn in search of one that belongs to the split


class SyntheticRow(NamedTuple):
    """Tokens of a stretch, five [tokens] int64 arrays, and the row of their sources, if any.

    `tokens` may have columns.
    """

    tokens: np.ndarray
    doc: np.ndarray
    pos: np.ndarray
    role: np.ndarray
    aims: np.ndarray
    source: "SyntheticRow | None" = None

    @staticmethod
    def blank(length: int, columns: tuple[int, ...] = ()) -> "SyntheticRow":
        """Returns `length` tokens of padding, each of these columns."""
        return SyntheticRow(
            tokens=np.full((length, *columns), 0, np.int64),
            doc=np.full(length, PADDING, np.int64),
            pos=np.full(length, 0, np.int64),
            role=np.full(length, TEXT, np.int64),
            aims=np.full(length, IGNORE, np.int64),
        )

    def put(
        self, start: int, tokens: np.ndarray, document: int, documents: np.ndarray | None = None
    ) -> slice:
        """Writes the tokens of a document from `start` on, and returns their place.

        Args:
            documents: [n] rising from 0, where there are several; the first is `document`.
        """
        place = slice(start, start + len(tokens))
        self.tokens[place] = tokens
        self.doc[place] = document
        self.pos[place] = np.arange(len(tokens))
        if documents is not None:
            self.doc[place] += documents
            self.pos[place] -= np.searchsorted(documents, documents)
        return place

    def cut(self, start: int, stop: int) -> "SyntheticRow":
        """Returns tokens start .. stop - 1, with the whole source."""
        columns = (column[start:stop] for column in self[:5])
        return SyntheticRow(*columns, source=self.source)


class SyntheticStream(StreamOfRows):
    """Rows of whole examples, as many as fit (or `task.per_row`), the rest padding; without end.

    A hash of the example decides if it is held out, so that training never meets it under any seed.
    Row n is the same on any ranks and in any batch that reads it; under `lanes` row i of a batch
    continues where row i of the one before ended, and an example may be longer than a row.

    Args:
        task: draws the examples.
        context_length, rows, seed, split, lanes: see open_stream.

    Raises:
        ValueError: examples longer than a row, more of them than fit, or none in this split.
    """

    def __init__(
        self,
        task: SyntheticTask,
        *,
        context_length: int,
        rows: int,
        seed: int,
        split: str = "train",
        lanes: bool = False,
    ):
        fault = misfit(task, context_length, lanes)
        if fault:
            raise DataError(fault, BAD_CONFIG)
        if split == "held_out" and not task.held_out:
            raise DataError(NONE_HELD_OUT, BAD_CONFIG)
        self.task = task
        self.tokenizer = task.tokenizer()
        self.vocabulary = task.vocabulary
        self.batches = None
        self.context_length = context_length
        self.rows = rows
        self.split = split
        self.lanes = lanes
        # Held-out examples are the same under every seed.
        self.key = f"{split} {seed if split == 'train' else 0}"
        self.stretch = 1
        if lanes:
            # Without aims, the last token of an example is only a target and is not read.
            longest_input = task.longest - (not task.aimed)
            self.stretch = -(-longest_input // context_length)
        self.pauses = self.stretch > 1
        self._stretches: dict[int, SyntheticRow] = {}
        settings = sorted((name, value) for name, value in vars(task).items())
        lane_count = rows if lanes else None
        identity = f"{type(task).__name__} {settings} {self.key} {context_length} {lane_count}"
        # An example too, because another version of numpy may draw other numbers.
        example = self._draw(self._random(0)).tokens.tobytes()
        self.fingerprint = hashlib.blake2b(identity.encode() + example, digest_size=12).hexdigest()

    def start(self) -> Cursor:
        """See Stream.start."""
        return {"rows": 0, "fingerprint": self.fingerprint}

    def read_rows(self, cursor: Cursor, first: int, last: int) -> OwnRows:
        """See Stream.read_rows; no example of another row is drawn."""
        self.admit(cursor)
        begin = cursor["rows"]
        stop = min(last, self.rows)
        # A rank without rows draws one to know how its padding looks.
        start = min(first, stop - 1)
        rows = [self._row(number) for number in range(begin + start, begin + stop)]
        batch = _stacked(rows, aimed=self.task.aimed)
        sources = [row.source for row in rows if row.source is not None]
        if sources:
            batch = batch._replace(source=_stacked(sources, aimed=False))
        # A document has a token at least, so no row has more of them than tokens. Those of lanes
        # have numbers of their own already.
        most = 0 if self.lanes else self.context_length + 1
        first_numbers = most * torch.arange(first, last)[:, None]
        following = {"rows": begin + self.rows, "fingerprint": self.fingerprint}
        return OwnRows(batch.part(first - start, last - start), following, first_numbers)

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        kind = "training" if self.split == "train" else "held-out"
        examples_per_row = "as many as fit" if self.task.per_row is None else str(self.task.per_row)
        words = [
            f"{kind} examples of {type(self.task).__name__}, made as they are read,"
            f" {self.task.longest} tokens at most"
        ]
        words.append(f"rows of {self.context_length} with {examples_per_row}")
        if self.task.has_source:
            words.append(f"rows of sources of {source_room(self.task, self.context_length)}")
        if self.stretch > 1:
            words.append(f"an example goes on over up to {self.stretch} rows of its lane")
        return "; ".join(words)

    def _row(self, number: int) -> SyntheticRow:
        """Returns row `number` of the run, [T + 1] in every array."""
        step, lane = divmod(number, self.rows)
        block, part = divmod(step, self.stretch)
        stretch = self._packed(block * self.rows + lane)
        start = part * self.context_length
        return stretch.cut(start, start + self.context_length + 1)

    def _packed(self, number: int) -> SyntheticRow:
        """Returns stretch `number` with its examples."""
        if number not in self._stretches:
            # Stretches of several rows are needed once for each row; two batches of them suffice.
            recent = list(self._stretches.items())[-2 * self.rows :]
            self._stretches = dict(recent) | {number: self._pack(number)}
        return self._stretches[number]

    def _pack(self, number: int) -> SyntheticRow:
        """Draws the examples of stretch `number` and lays them end to end."""
        length = self.stretch * self.context_length + 1
        stretch = SyntheticRow.blank(length, self.task.columns)
        # A row of sources has a token more than is read, as every row of a Batch.
        source_length = source_room(self.task, self.context_length)
        sources = SyntheticRow.blank(source_length + 1)
        random = self._random(number)
        # Under lanes, numbers must not recur: a memory would take two examples for one.
        first_document = number * length if self.lanes else 0
        start = 0
        source_start = 0
        count = 0
        document = first_document
        while self.task.per_row is None or count < self.task.per_row:
            example = self._draw(random)
            source = NO_TOKENS if example.source is None else example.source
            # The last token of a row is only a target, and an aim cannot stand there.
            full = start + len(example.tokens) > length - self.task.aimed
            if full or source_start + len(source) > source_length:
                break
            place = stretch.put(start, example.tokens, document, example.documents)
            if example.roles is not None:
                stretch.role[place] = example.roles
            elif example.targets is None:
                stretch.role[place] = np.where(example.given, GIVEN, TEXT)
            if example.targets is not None:
                stretch.aims[place] = example.targets
            source_start = sources.put(source_start, source, document).stop
            start = place.stop
            document += 1 if example.documents is None else int(example.documents[-1]) + 1
            count += 1
        return stretch._replace(source=sources) if self.task.has_source else stretch

    def _random(self, number: int) -> np.random.Generator:
        seed = digest(f"examples of {self.key} in stretch {number}")
        return np.random.Generator(np.random.PCG64(seed))

    def _draw(self, random: np.random.Generator) -> Example:
        """Draws examples until one belongs to this split, and returns it.

        Raises:
            DataError: none of DRAWS examples does.
        """
        for _ in range(DRAWS):
            example = self.task.drawn(random, self.split)
            if example is not None:
                return example
        state = "held out" if self.split == "held_out" else "left"
        raise DataError(
            f"of {DRAWS} examples of {type(self.task).__name__} none is {state}: it has too few"
            f" different ones for data.held_out={self.task.held_out}; give it more sizes, or"
            " another held_out",
            BAD_CONFIG,
        )


def source_room(task: SyntheticTask, context_length: int) -> int:
    """Returns the tokens of a row of sources."""
    return context_length if task.source_length is None else task.source_length


def _stacked(rows: Sequence[SyntheticRow], *, aimed: bool) -> Batch:
    """Returns rows of one length as a batch, without their sources."""
    columns = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*(row[:5] for row in rows))]
    tokens, doc, pos, role, aims = columns
    return Batch(tokens, doc, pos, role, aims if aimed else None)


def misfit(task: SyntheticTask, context_length: int, lanes: bool) -> str | None:
    """Describes why examples of a task do not fit in rows, or returns None."""
    # Without aims, a row's last token is a target and needs no position of its own.
    room = context_length + (not task.aimed)
    kind = type(task).__name__
    source_length = source_room(task, context_length)
    if task.longest_source > source_length:
        key = "context_length" if task.source_length is None else "data.source_length"
        return (
            f"{key}={source_length}, but the longest source of {kind} takes {task.longest_source};"
            f" use data.source_length={task.longest_source}, or smaller examples"
        )
    if lanes and task.has_source:
        return (
            f"memory: rows go on from row to row under it, but an example of {kind} is read with"
            " its source; use memory=none"
        )
    # Under lanes an example continues in the next row.
    if lanes:
        return None
    if task.longest > room:
        need = task.longest - (not task.aimed)
        return (
            f"context_length={context_length}, but the longest example of {kind} takes {need}; use"
            f" context_length={need}, or smaller examples; where a memory goes on from row to row"
            " they may be longer than a row"
        )
    if task.per_row and task.per_row * task.longest > room:
        return (
            f"data.per_row={task.per_row} examples of {task.longest} tokens do not fit in"
            f" context_length={context_length}; use data.per_row={room // task.longest}, or"
            f" context_length={task.per_row * task.longest}"
        )
    return None
