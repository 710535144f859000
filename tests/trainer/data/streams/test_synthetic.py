"""Rows of a task: the same whatever reads them, whole examples, and none in both splits."""

import numpy as np
import pytest

from models.loss import IGNORE
from models.span import GIVEN, TEXT
from trainer.data.errors import DataError
from trainer.data.open import check, open_stream
from trainer.data.tasks.base import Example, SyntheticTask
from trainer.data.tasks.copy import CopyTask
from trainer.data.tasks.retrieval import Retrieval


class Counting(SyntheticTask):
    """Documents 1 2 3 ... n behind a 0; every second token is given."""

    vocabulary, longest = 10, 6

    def __init__(self, *, held_out=0.2, per_row=None):
        super().__init__(held_out=held_out, per_row=per_row)

    def example(self, random):
        tokens = np.arange(int(random.integers(2, 7))) + random.integers(0, 4)
        return Example(tokens, tokens % 2 == 0)


def rows(stream, count):
    cursor, found = stream.start(), []
    for _ in range(count):
        batch, cursor = stream.read(cursor)
        found.append(batch)
    return found


def opened(task, length=20, many=3, **more):
    return open_stream(task, context_length=length, rows=many, **{"seed": 0, **more})


def test_a_batch_is_a_pure_function_of_its_cursor():
    stream, again = opened(CopyTask(max_length=5)), opened(CopyTask(max_length=5))
    third = rows(stream, 3)[2]
    batch, cursor = again.read({"rows": 6, "fingerprint": again.fingerprint})
    assert (
        all((a == b).all() for a, b in zip(third.tensors(), batch.tensors()))
        and cursor["rows"] == 9
    )


def test_a_row_is_the_same_in_a_batch_of_any_size():
    few, many = (
        rows(opened(CopyTask(max_length=5), many=2), 3),
        rows(opened(CopyTask(max_length=5), many=6), 1),
    )
    assert [row for batch in few for row in batch.tokens.tolist()] == many[0].tokens.tolist()


def test_seed_split_and_settings_each_change_the_rows_and_the_cursor_belongs_to_them():
    streams = [
        opened(CopyTask(max_length=5)),
        opened(CopyTask(max_length=5), seed=1),
        opened(CopyTask(max_length=5), split="held_out"),
        opened(CopyTask(max_length=6)),
        opened(CopyTask(max_length=5), length=21),
    ]
    assert len({stream.fingerprint for stream in streams}) == len(streams)
    assert len({str(rows(stream, 1)[0].tokens[:, :12].tolist()) for stream in streams[:4]}) == 4
    with pytest.raises(ValueError, match="belongs to other data"):
        streams[1].read(streams[0].start())


def test_held_out_examples_are_the_same_for_every_seed_and_never_trained_on():
    one, other = (
        rows(opened(CopyTask(max_length=2, bits=4), split="held_out", seed=seed), 4)
        for seed in (0, 5)
    )
    assert all((a.tokens == b.tokens).all() for a, b in zip(one, other))

    def documents(batches):
        return {
            tuple(batch.tokens[row][batch.doc[row] == doc].tolist())
            for batch in batches
            for row in range(len(batch.tokens))
            for doc in batch.doc[row].unique().tolist()
            if doc >= 0
        }

    trained, held_out = documents(rows(opened(CopyTask(max_length=2, bits=4)), 60)), documents(one)
    assert trained and held_out and not trained & held_out


def test_rows_hold_whole_examples_from_their_start_and_padding_behind():
    for batch in rows(opened(Counting(), length=19), 5):
        for tokens, doc, pos, role in zip(*(field.tolist() for field in batch[:4])):
            filled = sum(number >= 0 for number in doc)
            assert filled > 19 - 6 and all(number < 0 for number in doc[filled:])
            for here in range(filled):
                opens = here == 0 or doc[here] != doc[here - 1]
                assert pos[here] == (0 if opens else pos[here - 1] + 1)
                assert opens or tokens[here] == tokens[here - 1] + 1
                assert role[here] == (GIVEN if tokens[here] % 2 == 0 else TEXT)


def test_what_is_given_is_nobodys_target_and_to_a_model_it_is_text():
    (batch,) = rows(opened(Counting()), 1)
    targets = batch.targets()
    assert (targets != IGNORE).any() and ((targets == IGNORE) | (targets % 2 == 1)).all()
    assert (batch.span().role == TEXT).all() and (batch.role == GIVEN).any()


def test_targets_of_their_own_stand_where_they_are_meant():
    (batch,) = rows(opened(CopyTask(max_length=3, bits=3, per_row=1)), 1)
    start, end, blank = 8, 9, 10
    for tokens, aims in zip(batch.tokens.tolist(), batch.targets().tolist()):
        size = tokens.index(end) - 1
        shown = tokens[1 : 1 + size]
        assert tokens[0] == start and tokens[size + 2 : 2 * size + 1] == [blank] * (size - 1)
        assert aims == [IGNORE] * (size + 1) + shown + [IGNORE] * (20 - 2 * size - 1)


def test_a_part_of_a_batch_takes_its_aims_along():
    (batch,) = rows(opened(CopyTask(max_length=3)), 1)
    part = batch.part(2, 5)
    assert (part.targets()[0] == batch.targets()[2]).all() and (part.targets()[1:] == IGNORE).all()


def test_so_many_examples_a_row_as_asked():
    assert all(
        len(set(row) - {-1}) == 2
        for row in rows(opened(CopyTask(max_length=3, per_row=2)), 1)[0].doc.tolist()
    )


def test_under_lanes_an_example_goes_on_in_the_next_row_of_its_lane():
    task = Retrieval(segment=8, min_distance=2, max_distance=2, pairs=2)
    assert task.longest == 26
    lanes, whole = opened(task, length=10, many=2, lanes=True), opened(task, length=30, many=2)
    assert lanes.stretch == 3
    parts = rows(lanes, 6)
    for block in (0, 1):
        three, at_once = parts[3 * block : 3 * block + 3], rows(whole, 2)[block]
        for field in ("tokens", "pos"):
            joined = [getattr(batch, field)[:, :10] for batch in three]
            got = [[token for part in joined for token in part[lane].tolist()] for lane in range(2)]
            want = getattr(at_once, field).tolist()
            assert [line[:26] for line in got] == [line[:26] for line in want]
        assert sum(batch.predictions() for batch in three) == at_once.predictions() == 4


def test_what_does_not_fit_is_said_with_a_way_out():
    with pytest.raises(
        DataError,
        match="context_length=40, but the longest example of CopyTask takes 41; use context_length",
    ):
        opened(CopyTask(), length=40)
    with pytest.raises(
        DataError, match=r"per_row=2 examples of 41 tokens do not fit .* use data.per_row=1, or"
    ):
        opened(CopyTask(per_row=2), length=81)
    with pytest.raises(DataError, match="held_out=0"):
        opened(CopyTask(held_out=0.0), length=41, split="held_out")
    with pytest.raises(DataError, match="too few different ones"):
        opened(
            CopyTask(min_length=1, max_length=1, bits=1, held_out=0.001),
            length=41,
            split="held_out",
        )
    node = {"_target_": "trainer.data.tasks.copy.CopyTask", "max_length": 20}
    assert "use context_length=41" in check(node, context_length=40)[0]
    assert (
        check(node, context_length=41, evaluates=True)
        == []
        == check(node, context_length=10, lanes=True)
    )
