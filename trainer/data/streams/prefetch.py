"""Rows of coming steps, read and cut for this rank on a thread while a step is computed.

A rank reads the rows of its data rank alone, where the stream can (`Stream.read_rows`); what a step
must know of all rows comes from every rank in the all-reduce before it. A stream is a pure function
of cursors, so reading ahead changes no batch; a checkpoint holds the cursor of the last step that
was taken, whatever was read behind it.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from models.micro_batch import MicroBatch
from models.plans import PlanLog
from models.span import Span
from trainer.agreement import Marks, marks_of
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Cursor, Stream

JOIN_S = 5.0  # a thread that waits for a network longer than this is left behind


class StepCounts(NamedTuple):
    """Counts of rows: of a data rank until ranks have met, then of the whole step.

    Attributes:
        valid_tokens: targets.
        rows: those that are no padding.
        flops: of training on them.
    """

    valid_tokens: int
    rows: int
    flops: float

    @staticmethod
    def of(batch: Batch, share: BatchSharder, flops: "CountFlops") -> "StepCounts":
        """Returns the figures of the rows of a batch."""
        span = batch.span()
        source = None if batch.source is None else batch.source.span()
        return StepCounts(share.valid(batch), int(span.valid().any(1).sum()), flops(span, source))


CountFlops = Callable[[Span, Span | None], float]


class StepInput(NamedTuple):
    """Everything that a step reads.

    Attributes:
        cursor: of the next batch.
        marks: hashes of what was read, to be compared over ranks.
        figures: see StepCounts.
        cut: this rank's micro-batches on its device, each as the pieces of its rows, with True for
            the last; they are taken out one by one, since what layers derive from their addresses
            lives as long as they do.
    """

    cursor: Cursor
    marks: Marks
    figures: StepCounts
    cut: deque[tuple[list[MicroBatch], bool]]

    def micro_batches(self) -> Iterator[tuple[list[MicroBatch], bool]]:
        """Takes the micro-batches out, in order."""
        while self.cut:
            yield self.cut.popleft()


class Prefetcher:
    """Reads the inputs of steps one after another.

    Args:
        stream: the training data; nobody else reads it meanwhile.
        share: cuts a batch for this rank.
        ahead: steps that are read ahead on a thread; 0 = each is read when it is asked for.
        flops: counts those of training on rows of a span, and of the sources of another.

    Attributes:
        plans: what layers plan of addresses; whoever takes the first step lets it listen. The
            thread makes the same of the steps that it reads.
    """

    def __init__(
        self,
        stream: Stream,
        share: BatchSharder,
        ahead: int,
        flops: CountFlops = lambda span, source: 0.0,
    ):
        self.stream = stream
        self.share = share
        self.ahead = ahead
        self.flops = flops
        self.plans = PlanLog()
        self._expected: Cursor | None = None
        self._reader: _Reader | None = None

    def read(self, cursor: Cursor) -> StepInput:
        """Returns the input of the step at a cursor.

        Raises:
            Exception: what reading this step raised, on the thread or here.
        """
        if self.ahead == 0:
            return self.load(cursor)
        if self._reader is None or cursor != self._expected:
            self.close()
            self._reader = _Reader(self, cursor)
        found = self._reader.next()
        self._expected = found.cursor
        return found

    @property
    def is_ahead(self) -> bool:
        """True while a thread reads ahead."""
        return self._reader is not None

    def close(self) -> None:
        """Ends the thread; what it has read is forgotten."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._expected = None

    def load_planned(self, cursor: Cursor) -> StepInput:
        """Reads the input of the step at a cursor, and makes the plans of its layers."""
        given = self.load(cursor)
        for pieces, _ in given.cut:
            # Pieces of a row read what those before them leave, which no address tells ahead.
            if len(pieces) == 1:
                self.plans.make(pieces[0])
        return given

    def load(self, cursor: Cursor) -> StepInput:
        """Reads the input of the step at a cursor, here; the thread must not read meanwhile."""
        rows = self.stream.read_rows(cursor, *self.share.own)
        batch = rows.batch.raised(rows.first_numbers)
        return StepInput(
            cursor=rows.cursor,
            marks=marks_of(rows._replace(batch=batch), cursor, self.stream.fingerprint),
            figures=StepCounts.of(batch, self.share, self.flops),
            cut=deque(self.share.own_in_time(batch)),
        )


class _Reader:
    """A thread that loads step after step from a cursor on."""

    def __init__(self, owner: Prefetcher, cursor: Cursor):
        self._load = owner.load_planned
        self._found: queue.SimpleQueue[StepInput | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(owner.ahead)
        self._closed = threading.Event()
        # A daemon: a run that ends must not wait for a network.
        self._thread = threading.Thread(
            target=self._run, args=(cursor,), name="prefetch", daemon=True
        )
        self._thread.start()

    def next(self) -> StepInput:
        """Returns the next step's input; makes room for one more."""
        found = self._found.get()
        if isinstance(found, BaseException):
            # Asked again, it is raised again: nothing can be read behind it.
            self._found.put(found)
            raise found
        self._room.release()
        return found

    def close(self) -> None:
        """Lets the thread end behind the step that it reads."""
        self._closed.set()
        self._room.release()
        self._thread.join(JOIN_S)

    def _run(self, cursor: Cursor) -> None:
        while True:
            self._room.acquire()
            if self._closed.is_set():
                return
            try:
                found = self._load(cursor)
            # Raised again where the step is asked for, which may be never.
            except BaseException as error:
                self._found.put(error)
                return
            self._found.put(found)
            cursor = found.cursor
