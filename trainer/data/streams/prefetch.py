"""Batches of coming steps, read and cut for this rank on a thread while a step is computed.

A stream is a pure function of cursors, so reading ahead changes no batch; a checkpoint holds the
cursor of the last step that was taken, whatever was read behind it.
"""

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import NamedTuple

from models.micro_batch import MicroBatch
from trainer.agreement import mark
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Cursor, Stream

JOIN_S = 5.0  # a thread that waits for a network longer than this is left behind


class StepInput(NamedTuple):
    """Everything that a step reads.

    Attributes:
        batch: all rows of the step, on the CPU.
        cursor: of the next batch.
        mark: a hash of the batch and of its data, to be compared over ranks.
        valid_tokens: targets of the batch, over all ranks.
        cut: this rank's micro-batches on its device, each as the pieces of its rows, with True for
            the last; they are taken out one by one, since what layers derive from their addresses
            lives as long as they do.
    """

    batch: Batch
    cursor: Cursor
    mark: int
    valid_tokens: int
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
    """

    def __init__(self, stream: Stream, share: BatchSharder, ahead: int):
        self.stream = stream
        self.share = share
        self.ahead = ahead
        self._expected: Cursor | None = None
        self._reader: _Reader | None = None

    def read(self, cursor: Cursor) -> StepInput:
        """Returns the input of the step at a cursor.

        Raises:
            Exception: what reading this step raised, on the thread or here.
        """
        if self.ahead == 0:
            return self._load(cursor)
        if self._reader is None or cursor != self._expected:
            self.close()
            self._reader = _Reader(self, cursor)
        found = self._reader.next()
        self._expected = found.cursor
        return found

    def close(self) -> None:
        """Ends the thread; what it has read is forgotten."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        self._expected = None

    def _load(self, cursor: Cursor) -> StepInput:
        batch, following = self.stream.read(cursor)
        return StepInput(
            batch=batch,
            cursor=following,
            mark=mark(batch, self.stream.fingerprint),
            valid_tokens=self.share.valid(batch),
            cut=deque(self.share.in_time(batch)),
        )


class _Reader:
    """A thread that loads step after step from a cursor on."""

    def __init__(self, owner: Prefetcher, cursor: Cursor):
        self._load = owner._load
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
