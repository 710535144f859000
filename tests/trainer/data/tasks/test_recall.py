"""Multi-query associative recall: what an example looks like, and which wishes have none."""

import numpy as np
import pytest

from models.loss import IGNORE
from trainer.data.batch import Batch
from trainer.data.open import check, open_stream
from trainer.data.tasks.recall import RecallTask

NODE = {
    "_target_": "trainer.data.tasks.recall.RecallTask",
    "pairs": 3,
    "keys": 5,
    "values": 7,
    "length": 16,
}


def example(seed: int = 0, **settings):
    return RecallTask(**{"pairs": 3, "keys": 5, "values": 7, "length": 16, **settings}).example(
        np.random.default_rng(seed)
    )


@pytest.mark.parametrize("seed", range(20))
def test_every_key_is_asked_once_behind_the_pairs_and_answered_with_its_value(seed: int) -> None:
    tokens, _, targets, *_ = example(seed)
    assert targets is not None
    told = dict(zip(tokens[0:6:2].tolist(), tokens[1:6:2].tolist()))
    asked = np.flatnonzero(targets != IGNORE)
    assert len(told) == 3 and asked.min() >= 6
    assert {int(tokens[t]): int(targets[t]) for t in asked} == told
    assert all(1 <= key <= 5 < value <= 12 for key, value in told.items())
    assert not np.delete(tokens[6:], asked - 6).any()


def test_examples_have_fewer_pairs_where_that_is_asked_for() -> None:
    drawn = [example(seed, min_pairs=1) for seed in range(60)]
    assert {int((each.targets != IGNORE).sum()) for each in drawn} == {1, 2, 3}


def test_near_queries_are_favoured_unless_nearness_is_one() -> None:
    def mean(nearness: float) -> float:
        drawn = [example(seed, length=206, nearness=nearness) for seed in range(300)]
        return float(np.mean([np.flatnonzero(each.targets != IGNORE).mean() - 5 for each in drawn]))

    assert mean(0.01) < 60 < 90 < mean(1.0) < 111


def test_a_stream_of_it_predicts_the_answers_and_nothing_else() -> None:
    stream = open_stream(NODE, context_length=16, rows=4, seed=0)
    batch, _ = stream.read(stream.start())
    assert isinstance(batch, Batch) and batch.predictions() == 4 * 3
    assert stream.vocabulary == 13 and stream.tokenizer.decode([0, 1, 6]) == "_ k0 v0"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pairs": 6}, "data.pairs=6 need as many different keys, but data.keys=5"),
        (
            {"length": 8},
            (
                r"data.length=8 has no room for 3 pairs and 3 queries; use data.length=9 or more,"
                r" or data.pairs=2"
            ),
        ),
        ({"nearness": 0}, "data.nearness=0 is no number above 0"),
        ({"min_pairs": 4}, "data.min_pairs=4 is above data.pairs=3"),
        ({"pairs": 0}, "data.pairs=0"),
        ({"values": 1}, "data.values=1"),
    ],
)
def test_a_wish_without_examples_is_refused_with_a_way_out(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        example(**settings)


def test_an_example_longer_than_a_row_is_found_before_the_run() -> None:
    assert "context_length=15" in check(NODE, context_length=15)[0]
    assert check(NODE, context_length=16, evaluates=True) == []
