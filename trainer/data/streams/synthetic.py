"""Batches of a task: examples drawn as they are needed, a pure function of (seed, split, row
number, settings).

Legend: R rows of a batch, T context length. A *stretch* is the fewest rows of a lane that any
example fits in: one, unless `lanes` lets an example go on in the next row.
"""

import hashlib
from typing import NamedTuple

import numpy as np
import torch

from models.loss import IGNORE
from models.span import GIVEN, PADDING, TEXT
from trainer.data.batch import Batch
from trainer.data.errors import NONE_HELD_OUT, DataError
from trainer.data.split import digest, is_held_out
from trainer.data.streams.base import Cursor, Stream
from trainer.data.tasks.base import Example, SyntheticTask
from trainer.errors import BAD_CONFIG

DRAWS = 20_000  # examples drawn in search of one that belongs to the split


class SyntheticRow(NamedTuple):
    """The tokens of a stretch, five [tokens] int64 arrays."""

    tokens: np.ndarray
    doc: np.ndarray
    pos: np.ndarray
    role: np.ndarray
    aims: np.ndarray


class SyntheticStream(Stream):
    """Rows of whole examples, as many as fit (or `task.per_row`), the rest padding; without end.

    An example is held out if a hash of it says so, so that none is ever met in training, whatever
    the seed. Row n is the same on any ranks and in any batch that reads it; under `lanes` row i of
    a batch goes on where row i of the one before ended, and an example may be longer than a row.

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
        if fault := misfit(task, context_length, lanes):
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
        self.key = f"{split} {seed if split == 'train' else 0}"
        self.stretch = -(-(task.longest - (not task.aimed)) // context_length) if lanes else 1
        self.pauses = self.stretch > 1
        self._stretches: dict[int, SyntheticRow] = {}
        settings = sorted((name, value) for name, value in vars(task).items())
        said = (
            f"{type(task).__name__} {settings} {self.key} {context_length}"
            f" {rows if lanes else None}"
        )
        first = self._draw(
            self._random(0)
        ).tokens.tobytes()  # another numpy might draw other numbers
        self.fingerprint = hashlib.blake2b(said.encode() + first, digest_size=12).hexdigest()

    def start(self) -> Cursor:
        return {"rows": 0, "fingerprint": self.fingerprint}

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        self.admit(cursor)
        first = cursor["rows"]
        fields = (
            torch.from_numpy(np.stack(arrays))
            for arrays in zip(*map(self._row, range(first, first + self.rows)))
        )
        tokens, doc, pos, role, aims = fields
        batch = Batch(tokens, doc, pos, role, aims if self.task.aimed else None)
        return batch, {"rows": first + self.rows, "fingerprint": self.fingerprint}

    def describe(self, steps: int | None = None) -> str:
        kind = "training" if self.split == "train" else "held-out"
        many = "as many as fit" if self.task.per_row is None else str(self.task.per_row)
        words = [
            f"{kind} examples of {type(self.task).__name__}, made as they are read,"
            f" {self.task.longest} tokens at most"
        ]
        words.append(f"rows of {self.context_length} with {many}")
        if self.stretch > 1:
            words.append(f"an example goes on over up to {self.stretch} rows of its lane")
        return "; ".join(words)

    def _row(self, number: int) -> SyntheticRow:
        """[T + 1] of every array: row `number` of the run."""
        step, lane = divmod(number, self.rows)
        block, part = divmod(step, self.stretch)
        packed = self._packed(block * self.rows + lane)
        here = slice(part * self.context_length, (part + 1) * self.context_length + 1)
        return SyntheticRow(*(each[here] for each in packed))

    def _packed(self, number: int) -> SyntheticRow:
        """A stretch with its examples."""
        if number not in self._stretches:
            recent = list(self._stretches.items())[-2 * self.rows :]
            self._stretches = dict(recent) | {number: self._pack(number)}
        return self._stretches[number]

    def _pack(self, number: int) -> SyntheticRow:
        tokens = self.stretch * self.context_length + 1
        fills = (0, PADDING, 0, TEXT, IGNORE)
        packed = SyntheticRow(*(np.full(tokens, fill, np.int64) for fill in fills))
        random = self._random(number)
        here = 0
        count = 0
        first = (
            number * tokens if self.lanes else 0
        )  # numbers of documents go on, so that a memory never mixes two up
        while self.task.per_row is None or count < self.task.per_row:
            example = self._draw(random)
            until = here + len(example.tokens)
            if until > tokens - self.task.aimed:
                break
            packed.tokens[here:until] = example.tokens
            packed.doc[here:until] = first + count
            packed.pos[here:until] = np.arange(until - here)
            if example.targets is None:
                packed.role[here:until] = np.where(example.given, GIVEN, TEXT)
            else:
                packed.aims[here:until] = example.targets
            here = until
            count = count + 1
        return packed

    def _random(self, number: int) -> np.random.Generator:
        return np.random.Generator(
            np.random.PCG64(digest(f"examples of {self.key} in stretch {number}"))
        )

    def _draw(self, random: np.random.Generator) -> Example:
        """The next example that belongs to this split."""
        for _ in range(DRAWS):
            example = self.task.example(random)
            hashed = hashlib.blake2b(self.task.identity(example), digest_size=8).digest()
            held_out = is_held_out(
                np.array([int.from_bytes(hashed, "little")], np.uint64), self.task.held_out
            )[0]
            if bool(held_out) == (self.split == "held_out"):
                return example
        raise DataError(
            f"of {DRAWS} examples of {type(self.task).__name__} none is"
            f" {'held out' if self.split == 'held_out' else 'left'}: it has too few different ones"
            f" for data.held_out={self.task.held_out}; give it more sizes, or another held_out",
            BAD_CONFIG,
        )


def misfit(task: SyntheticTask, context_length: int, lanes: bool) -> str | None:
    """Why examples of a task do not fit in rows, or None where they do."""
    room = context_length + (not task.aimed)
    kind = type(task).__name__
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
