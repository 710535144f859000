"""Data read as it comes: documents dealt to a fixed number of lanes, each packing its own into
rows.

Legend: R rows of a batch, one lane each; T context length. Document i of a split goes to lane i %
R, so what a lane reads depends on nothing but the data and R. A cursor holds, for each lane, the
documents it has finished and the offset in the one at hand, and a recent state of the reader, from
which the documents not yet finished are read again.
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
SNAPSHOT = 64  # documents read between two states kept for cursors
KEPT = (
    4 << 20
)  # tokens of held-out batches kept in memory, so that the next evaluation does not read again


class StreamLane:
    """What one row of every batch reads: documents finished, tokens used of the one at hand, tokens
    waiting."""

    def __init__(self, taken: int, offset: int):
        self.taken = taken
        self.offset = offset
        self.waiting: deque[np.ndarray] = deque()
        self.held = -offset  # tokens waiting beyond the offset

    def add(self, tokens: np.ndarray) -> None:
        self.waiting.append(tokens)
        self.held += len(tokens)

    def row(self, length: int, *, goes_on: bool) -> PackedRow:
        """The next `length` tokens, padded where there are fewer; the lane stays where it is."""
        pieces = []
        begin = self.offset
        left = length
        for number, tokens in enumerate(self.waiting, self.taken):
            piece = DocumentSlice(number, begin, tokens[begin : begin + left])
            if len(piece.tokens):
                pieces.append(piece)
            left = left - len(piece.tokens)
            begin = 0
            if not left:
                break
        return lay_out(pieces, length, goes_on=goes_on)

    def advance(self, tokens: int) -> None:
        """Leave so many tokens behind, or all that there are."""
        self.held = max(self.held - tokens, 0)
        self.offset += tokens
        while self.waiting and self.offset >= len(self.waiting[0]):
            self.offset -= len(self.waiting.popleft())
            self.taken += 1
        if not self.waiting:
            self.offset = 0


class StreamingStream(Stream):
    """Batches of streamed data, in the data set's own order; training goes round without end.

    `seed` shuffles nothing here: a buffer shuffle cannot be resumed exactly. Held-out documents are
    those whose number falls in the held-out fraction; they are read once and followed by padding.
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
        sample = source.sample()  # first, for it says what is wrong with the data
        said = f"{source.content()} {sample} {self.tokenizer.fingerprint} {shape}"
        self.fingerprint = hashlib.blake2b(
            said.encode("utf-8", "surrogatepass"), digest_size=12
        ).hexdigest()
        self._at: Cursor | None = None
        self._kept: dict[int, tuple[Batch, Cursor]] = {}

    def start(self) -> Cursor:
        lanes = [[0, 0] for _ in range(self.rows)]
        return {
            "rows": 0,
            "lanes": lanes,
            "reader": DocumentReader.start(),
            "fingerprint": self.fingerprint,
        }

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        self.admit(cursor)
        if cursor["rows"] in self._kept:
            return self._kept[cursor["rows"]]
        if cursor != self._at:
            self._seek(cursor)
        length = self.context_length + 1
        while any(lane.held < length for lane in self.lanes) and self._deal():
            pass
        batch = stack([lane.row(length, goes_on=self.goes_on) for lane in self.lanes])
        for lane in self.lanes:
            lane.advance(self.context_length)
        self._at = self._cursor(cursor["rows"] + self.rows)
        if (
            self.split == "held_out"
            and (len(self._kept) + 1) * self.rows * self.context_length <= KEPT
        ):
            self._kept[cursor["rows"]] = batch, self._at
        return batch, self._at

    def _seek(self, cursor: Cursor) -> None:
        self.lanes = [StreamLane(taken, offset) for taken, offset in cursor["lanes"]]
        self.dealer = DocumentReader(self.source, self.split, self.report, cursor["reader"])
        self.snapshots: deque[dict[str, Any]] = deque([cursor["reader"]])
        # What lies before the place to go on from is not tokenised again: it held tokens, or the
        # run would have ended.
        self.epoch = self.dealer.epoch
        self.spoke = self.dealer.fresh > 0

    def _deal(self) -> bool:
        """Give the next document to its lane; False where there is none. A lane drops what it had
        finished before.

        A document without tokens keeps its number, and nothing is laid for it, not even its end.
        """
        if self.dealer.read >= SNAPSHOT:
            state = self.dealer.state()
            if state["dealt"] == self.snapshots[-1]["dealt"]:
                self.snapshots.pop()
            self.snapshots.append(state)
        text = self.dealer.next()
        if text is None:
            return False
        if self.dealer.epoch > self.epoch:
            if not self.spoke:
                raise DataError(NOTHING.format(self.source.identity(), self.source.tokenizer_name))
            self.epoch = self.dealer.epoch
            self.spoke = False
        turn, number = divmod(self.dealer.dealt - 1, self.rows)
        lane = self.lanes[number]
        if turn >= lane.taken:
            lane.add(self._tokens(text))
        else:
            self.spoke = True
        return True

    def _tokens(self, text: str) -> np.ndarray:
        """The tokens of a document with its end; none where the tokenizer makes none."""
        tokens = self.tokenizer.encode(text)
        if not len(tokens):
            self.report.silent += 1
            return tokens
        self.spoke = True
        return ended(tokens, self.tokenizer.end_of_text)

    def _cursor(self, rows: int) -> Cursor:
        """The state of the reader kept in it is the newest before every document that a lane has
        yet to finish."""
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
