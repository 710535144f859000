"""Retrieval: what is asked for lies segments back, and only there."""

from collections import Counter

import numpy as np
import pytest

from trainer.data.tasks.retrieval import Retrieval


def examples(task, count=200):
    random = np.random.default_rng(0)
    return [task.example(random) for _ in range(count)]


def test_every_value_is_that_of_its_key_in_the_first_segment_and_asked_for_beyond():
    task, lengths = Retrieval(segment=10, near=1, far=3, pairs=3), Counter()
    for example in examples(task):
        tokens = example.tokens.tolist()
        shown = dict(zip(tokens[0:6:2], tokens[1:6:2]))
        asked = len(tokens) - 6
        assert asked % 10 == 0 and len(shown) == 3
        assert dict(zip(tokens[asked::2], tokens[asked + 1 :: 2])) == shown
        assert all(task.keys + task.values <= filler < task.vocabulary for filler in tokens[6:asked])
        assert np.flatnonzero(~example.given).tolist() == [asked + 1, asked + 3, asked + 5]
        lengths[asked // 10 - 1] += 1
    assert set(lengths) == {1, 2, 3} and task.longest == 46


def test_values_repeat_so_that_nothing_is_won_by_elimination():
    same = [len(set(example.tokens[1:8:2].tolist())) < 4 for example in examples(Retrieval(values=4))]
    assert 0.8 < sum(same) / len(same) < 1.0  # 1 - 4!/4^4 = 0.906


def test_settings_that_make_no_task_are_refused():
    with pytest.raises(ValueError, match=r"data.pairs=4 take 8 tokens, data.segment=7; use segment=8"):
        Retrieval(segment=7)
    with pytest.raises(ValueError, match=r"data.near=2 is above data.far=1"):
        Retrieval(near=2)
    with pytest.raises(ValueError, match=r"data.keys=3"):
        Retrieval(keys=3)
