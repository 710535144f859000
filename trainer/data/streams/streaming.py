"""Batches of streamed data: documents are dealt to lanes, each of which packs its own into rows.

Document i of a split goes to lane i % R, so that what a lane reads depends on the data and R alone.
A cursor holds, for each lane, the number of documents that it has finished and the offset in the
current one, and a recent state of the reader, from which the unfinished documents are read again.

Letters: R rows of a batch, one lane each; T context length.
"""

import hashlib
from collections import deque
from typing import Any

import numpy as np

from trainer.data.batch import Batch
from trainer.data.errors import NONE_HELD_OUT, DataError, ReadReport
from trainer.data.packing import DocumentSlice, PackedRow, lay_out, stack
from trainer.data.sources.streaming import DocumentReader, StreamingSource
from trainer.data.streams.base import Cursor, Stream
from trainer.data.tokenizers import ended
from trainer.errors import BAD_CONFIG

NOTHING = (
    "{} has nothing to train on: of none of its documents does data.tokenizer={} make a token; give"
    " other data, or another tokenizer"
)
SNAPSHOT = 64  # documents between two states of the reader that cursors may hold
KEPT = 4 << 20  # tokens of held-out batches in memory, so that later evaluations read nothing


class StreamLane:
    """The documents that one row of every batch reads.

    Args:
        taken: number of documents finished.
        offset: number of tokens used of the current one.

    Attributes:
        waiting: tokens of the current document and of those after it.
        held: number of tokens in `waiting` behind the offset; negative before the current document
            has been read again after a resume.
    """

    def __init__(self, taken: int, offset: int):
        self.taken = taken
        self.offset = offset
        self.waiting: deque[np.ndarray] = deque()
        self.held = -offset

    def add(self, tokens: np.ndarray) -> None:
        """Appends a document."""
        self.waiting.append(tokens)
        self.held += len(tokens)

    def row(self, length: int, *, goes_on: bool) -> PackedRow:
        """Returns the next `length` tokens, padded where there are fewer, without advancing."""
        pieces = []
        begin = self.offset
        left = length
        for number, tokens in enumerate(self.waiting, self.taken):
            piece = DocumentSlice(number, begin, tokens[begin : begin + left])
            # A document without tokens keeps its number and takes no part in the row.
            if len(piece.tokens):
                pieces.append(piece)
            left -= len(piece.tokens)
            begin = 0
            if not left:
                break
        return lay_out(pieces, length, goes_on=goes_on)

    def advance(self, tokens: int) -> None:
        """Moves on by a number of tokens, or to the end of what is waiting."""
        self.held = max(self.held - tokens, 0)
        self.offset += tokens
        while self.waiting and self.offset >= len(self.waiting[0]):
            self.offset -= len(self.waiting.popleft())
            self.taken += 1
        if not self.waiting:
            self.offset = 0


class StreamingStream(Stream):
    """Batches of streamed data in the data set's own order; training repeats it without end.

    `seed` has no effect: a buffer shuffle cannot be resumed exactly. Held-out documents are those
    whose number falls in the held-out fraction; they are read once and followed by padding.

    Args:
        source: the documents.
        context_length, rows, seed, split, lanes: see open_stream.

    Raises:
        ValueError: nothing is held out, or data that cannot be read.
    """

    def __init__(
        self,
        source: StreamingSource,
        *,
        context_length: int,
        rows: int,
        seed: int,
        split: str = "train",
        lanes: bool = False,
    ):
        self.source = source
        self.context_length = context_length
        self.rows = rows
        self.goes_on = lanes
        self.split = split
        self.batches = None
        self.tokenizer = source.tokenizer()
        self.vocabulary = self.tokenizer.vocabulary
        self.report = ReadReport(source.on_error)
        source.leave_out(self.report)
        if split == "held_out" and not source.held_out:
            raise DataError(NONE_HELD_OUT, BAD_CONFIG)
        shape = (split, source.held_out, context_length, rows, lanes)
        # Before source.content(), because its message says what is wrong with the data.
        sample = source.sample()
        identity = f"{source.content()} {sample} {self.tokenizer.fingerprint} {shape}"
        encoded = identity.encode("utf-8", "surrogatepass")
        self.fingerprint = hashlib.blake2b(encoded, digest_size=12).hexdigest()
        self._position: Cursor | None = None
        self._cached: dict[int, tuple[Batch, Cursor]] = {}

    def start(self) -> Cursor:
        """See Stream.start."""
        lanes = [[0, 0] for _ in range(self.rows)]
        return {
            "rows": 0,
            "lanes": lanes,
            "reader": DocumentReader.start(),
            "fingerprint": self.fingerprint,
        }

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        """See Stream.read; reading in order is fast, any other cursor reads documents again."""
        self.admit(cursor)
        number = cursor["rows"]
        if number in self._cached:
            return self._cached[number]
        if cursor != self._position:
            self._seek(cursor)
        length = self.context_length + 1
        while any(lane.held < length for lane in self.lanes):
            if not self._deal():
                break
        batch = stack([lane.row(length, goes_on=self.goes_on) for lane in self.lanes])
        # One token less than the row: its last token is the first of the next row.
        for lane in self.lanes:
            lane.advance(self.context_length)
        self._position = self._cursor(number + self.rows)
        cached_tokens = (len(self._cached) + 1) * self.rows * self.context_length
        if self.split == "held_out" and cached_tokens <= KEPT:
            self._cached[number] = (batch, self._position)
        return batch, self._position

    def _seek(self, cursor: Cursor) -> None:
        """Opens the reader at the state of a cursor."""
        self.lanes = [StreamLane(taken, offset) for taken, offset in cursor["lanes"]]
        self.dealer = DocumentReader(self.source, self.split, self.report, cursor["reader"])
        self.snapshots: deque[dict[str, Any]] = deque([cursor["reader"]])
        # Documents before the cursor are not tokenized again: they held tokens, or the run would
        # have ended.
        self.epoch = self.dealer.epoch
        self.spoke = self.dealer.fresh > 0

    def _deal(self) -> bool:
        """Gives the next document to its lane; returns False where there is none.

        A document without tokens keeps its number, and nothing is laid out for it, not even its
        end.

        Raises:
            DataError: a whole epoch yields no token.
        """
        if self.dealer.read >= SNAPSHOT:
            state = self.dealer.state()
            # A later state before the same document is as good, and resumes faster.
            if state["dealt"] == self.snapshots[-1]["dealt"]:
                self.snapshots.pop()
            self.snapshots.append(state)
        text = self.dealer.next()
        if text is None:
            return False
        if self.dealer.epoch > self.epoch:
            # Without this the loop of `read` would never end.
            if not self.spoke:
                raise DataError(NOTHING.format(self.source.identity(), self.source.tokenizer_name))
            self.epoch = self.dealer.epoch
            self.spoke = False
        turn, number = divmod(self.dealer.dealt - 1, self.rows)
        lane = self.lanes[number]
        # After a resume, documents that the lane had finished come by once more.
        if turn >= lane.taken:
            lane.add(self._tokens(text))
        else:
            self.spoke = True
        return True

    def _tokens(self, text: str) -> np.ndarray:
        """Returns the tokens of a document with its end; none where its text yields none."""
        tokens = self.tokenizer.encode(text)
        if not len(tokens):
            self.report.silent += 1
            return tokens
        self.spoke = True
        return ended(tokens, self.tokenizer.end_of_text)

    def _cursor(self, rows: int) -> Cursor:
        """Returns the cursor of the next batch, with the newest state of the reader that serves.

        It must come before every document that a lane has not finished.
        """
        needed = min(lane.taken * self.rows + number for number, lane in enumerate(self.lanes))
        while len(self.snapshots) > 1 and self.snapshots[1]["dealt"] <= needed:
            self.snapshots.popleft()
        lanes = [[lane.taken, lane.offset] for lane in self.lanes]
        return {
            "rows": rows,
            "lanes": lanes,
            "reader": self.snapshots[0],
            "fingerprint": self.fingerprint,
        }

    def describe(self, steps: int | None = None) -> str:
        """See Stream.describe."""
        kind = "training" if self.split == "train" else "held-out"
        words = [
            f"{kind} documents of {self.source.identity()}, streamed in their own order into"
            f" {self.rows} lanes"
        ]
        if steps is not None and self.split == "train":
            words.append(
                f"{steps} steps read up to {steps * self.rows * self.context_length} tokens"
            )
        words += [remark for remark in (self.report.text(), self.tokenizer.remark) if remark]
        return "; ".join(words)
