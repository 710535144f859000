"""Batches read ahead on a thread are those that are read when they are needed."""

import threading
from dataclasses import replace

import pytest
import torch

from parallel.mesh import Axis, Mesh
from trainer.agreement import Marks, mark
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Stream
from trainer.data.streams.prefetch import Prefetcher

ROWS, LENGTH = 3, 8
WAIT_S = 30


class Counting(Stream):
    """A stream that notes which batches were read; the batch `spoilt` cannot be."""

    fingerprint = "counting"
    vocabulary = 100
    rows = ROWS
    batches = None

    def __init__(self, spoilt=None):
        self.spoilt = spoilt
        self.read_numbers = []
        self.changed = threading.Condition()

    def start(self):
        return {"number": 0}

    def read(self, cursor):
        number = cursor["number"]
        with self.changed:
            self.read_numbers.append(number)
            self.changed.notify_all()
        if number == self.spoilt:
            raise ValueError(f"batch {number} is spoilt")
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(self.vocabulary, (ROWS, LENGTH + 1), generator=generator)
        pos = torch.arange(LENGTH + 1).expand(ROWS, -1)
        batch = Batch(tokens, torch.zeros_like(tokens), pos, torch.zeros_like(tokens))
        return batch, {"number": number + 1}

    def describe(self, steps=None):
        return "counting"

    def wait_for(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.read_numbers) >= count, WAIT_S)


def made(ahead, spoilt=None):
    stream = Counting(spoilt)
    share = BatchSharder(
        Mesh.alone(), rows=ROWS, context_length=LENGTH, micro_batch=2, policy="zigzag", time=2
    )
    return stream, share, Prefetcher(stream, share, ahead, tokens_of)


def tokens_of(span, source):
    return float(span.pos.numel())


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_step_is_given_what_it_would_read_itself(ahead):
    stream, share, prefetcher = made(ahead)
    cursor = stream.start()
    for _ in range(5):
        expected, following = Counting().read(cursor)
        given = prefetcher.read(cursor)
        assert given.cursor == following
        assert given.marks.rows == mark(expected.numbered(), stream.fingerprint)
        assert given.figures == (ROWS * LENGTH, ROWS, float(expected.tokens[:, :-1].numel()))
        for (pieces, last), (want, want_last) in zip(
            given.micro_batches(), share.in_time(expected), strict=True
        ):
            assert last == want_last and len(pieces) == len(want) == 2
            for piece, same in zip(pieces, want, strict=True):
                assert torch.equal(piece.tokens, same.tokens)
                assert torch.equal(piece.targets, same.targets)
                assert torch.equal(piece.span.doc, same.span.doc)
        assert not list(given.micro_batches())
        cursor = given.cursor
    prefetcher.close()


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_steps_are_read_ahead_and_no_more(ahead):
    stream, _, prefetcher = made(ahead)
    cursor = stream.start()
    for taken in (1, 2):
        cursor = prefetcher.read(cursor).cursor
        stream.wait_for(taken + ahead)
    # Were there room for another, the thread would have read it by the time it has ended.
    thread = prefetcher._reader._thread
    prefetcher.close()
    assert not thread.is_alive()
    assert stream.read_numbers == list(range(2 + ahead))


def test_a_fault_is_raised_at_its_own_step_each_time_it_is_asked_for():
    stream, _, prefetcher = made(3, spoilt=2)
    first = prefetcher.read(stream.start())
    stream.wait_for(3)
    second = prefetcher.read(first.cursor)
    for _ in range(2):
        with pytest.raises(ValueError, match="batch 2 is spoilt"):
            prefetcher.read(second.cursor)
    prefetcher.close()


def test_another_cursor_begins_anew_there():
    stream, _, prefetcher = made(2)
    prefetcher.read(stream.start())
    given = prefetcher.read({"number": 7})
    assert given.cursor == {"number": 8}
    (pieces, _), *_ = given.micro_batches()
    assert torch.equal(pieces[0].tokens, Counting().read({"number": 7})[0].tokens[:2, :4])
    prefetcher.close()


def test_data_ranks_read_their_rows_and_agree_on_what_they_must():
    found = []
    for rank in range(2):
        stream, share, _ = made(0)
        share = BatchSharder(
            replace(Mesh.alone(), data=Axis(rank, 2)),
            rows=ROWS,
            context_length=LENGTH,
            micro_batch=2,
            policy="zigzag",
        )
        found.append(Prefetcher(stream, share, 0, tokens_of).read(stream.start()))
    batch, _ = Counting().read({"number": 0})
    batch = batch.numbered()
    for given, rows, first in zip(found, (2, 1), (0, 2)):
        assert given.figures[:2] == (rows * LENGTH, rows)
        assert given.marks.rows == mark(batch.part(first, first + 2), "counting")
        (pieces, last), *more = given.micro_batches()
        assert last and not more
        assert torch.equal(pieces[0].tokens[:rows], batch.tokens[first : first + rows, :-1])
        assert torch.equal(pieces[0].span.doc[:rows], batch.doc[first : first + rows, :-1])
    assert found[0].marks.step == found[1].marks.step != 0
    assert found[0].marks.rows != found[1].marks.rows
    other = Prefetcher(Counting(), share, 0).read({"number": 1})
    assert other.marks.step != found[0].marks.step and Marks() == (0, 0)
