"""Retrieval: what is asked for lies segments back, and only there."""

from collections import Counter

import numpy as np
import pytest

from models.loss import IGNORE
from trainer.data.tasks.retrieval import Retrieval


def examples(task, count=200):
    random = np.random.default_rng(0)
    return [task.example(random) for _ in range(count)]


def test_every_value_is_that_of_its_key_in_the_first_segment_and_asked_for_beyond():
    task, lengths = Retrieval(segment=10, min_distance=1, max_distance=3, pairs=3), Counter()
    for example in examples(task):
        tokens = example.tokens.tolist()
        shown = dict(zip(tokens[0:6:2], tokens[1:6:2]))
        asked = len(tokens) - 3
        assert asked % 10 == 0 and len(shown) == 3
        assert dict(zip(tokens[asked:], example.targets[asked:].tolist())) == shown
        assert (example.targets[:asked] == IGNORE).all()
        assert all(
            task.keys + task.values <= filler < task.vocabulary for filler in tokens[6:asked]
        )
        lengths[asked // 10 - 1] += 1
    assert set(lengths) == {1, 2, 3} and task.longest == 43


def test_no_answer_stands_in_the_row_so_that_nothing_is_won_by_elimination():
    task = Retrieval(segment=8, min_distance=0, max_distance=0, pairs=4)
    for example in examples(task):
        assert all(word < task.keys for word in example.tokens[8:])


def test_settings_that_make_no_task_are_refused():
    with pytest.raises(
        ValueError, match=r"data.pairs=4 take 8 tokens, data.segment=7; use segment=8"
    ):
        Retrieval(segment=7)
    with pytest.raises(ValueError, match=r"data.min_distance=2 is above data.max_distance=1"):
        Retrieval(min_distance=2)
    with pytest.raises(ValueError, match=r"data.keys=3"):
        Retrieval(keys=3)


def test_questions_may_follow_the_pairs_at_once():
    places = set()
    for example in examples(Retrieval(segment=12, min_distance=-1, max_distance=0, pairs=4)):
        shown = dict(zip(example.tokens[0:8:2].tolist(), example.tokens[1:8:2].tolist()))
        asked = np.flatnonzero(example.targets != IGNORE)
        assert [shown[key] for key in example.tokens[asked].tolist()] == example.targets[
            asked
        ].tolist()
        places.add(tuple(asked.tolist()))
    assert places == {(8, 9, 10, 11), (12, 13, 14, 15)}
    with pytest.raises(
        ValueError, match=r"data.pairs=4 take 12 tokens, data.segment=11; use segment=12"
    ):
        Retrieval(segment=11, min_distance=-1)
