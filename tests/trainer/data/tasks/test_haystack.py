"""Needles in a haystack of tokens: where the pairs stand, what is asked, which wishes have none."""

import numpy as np
import pytest

from models.loss import IGNORE
from trainer.data.errors import DataError
from trainer.data.open import open_stream
from trainer.data.tasks.haystack import HaystackTask

SIZES = {"pairs": 3, "keys": 5, "values": 7, "fillers": 2}


def example(seed: int = 0, **settings):
    task = HaystackTask(**{**SIZES, "length": 40, **settings})
    return task.example(np.random.default_rng(seed))


def where(tokens: np.ndarray) -> int:
    """The place of the first pair: the first token that is no filler."""
    return int(np.flatnonzero(tokens < 12)[0])


@pytest.mark.parametrize("seed", range(20))
def test_every_key_is_asked_once_at_the_end_and_answered_with_its_value(seed: int) -> None:
    tokens, _, targets, *_ = example(seed)
    assert targets is not None
    begin = where(tokens)
    told = dict(zip(tokens[begin : begin + 6 : 2].tolist(), tokens[begin + 1 : begin + 6 : 2]))
    asked = np.flatnonzero(targets != IGNORE)
    assert asked.tolist() == [37, 38, 39] and len(told) == 3
    assert {int(tokens[place]): int(targets[place]) for place in asked} == told
    assert all(key < 5 <= value < 12 for key, value in told.items())
    filler = np.delete(tokens[:37], range(begin, begin + 6))
    assert set(filler.tolist()) == {12, 13}


@pytest.mark.parametrize(("depth", "place"), [(0.0, 0), (0.5, 16), (1.0, 31), (0, 0), (1, 31)])
def test_the_pairs_stand_at_the_depth_that_is_asked_for(depth: float, place: int) -> None:
    assert {where(example(seed, depth=depth).tokens) for seed in range(10)} == {place}


def test_examples_of_two_depths_differ_in_it_alone() -> None:
    first = example(depth=0.0)
    last = example(depth=1.0)
    assert (first.targets == last.targets).all()
    assert (first.tokens[:6] == last.tokens[31:37]).all()


def test_without_a_depth_they_stand_anywhere() -> None:
    places = {where(example(seed, length=12).tokens) for seed in range(100)}
    assert places == {0, 1, 2, 3}


def test_lengths_are_drawn_evenly_by_the_logarithm() -> None:
    lengths = np.array([len(example(seed, min_length=9, length=144).tokens) for seed in range(900)])
    assert lengths.min() == 9 and lengths.max() >= 140 and lengths.max() <= 144
    counts = np.histogram(lengths, [9, 18, 36, 72, 145])[0]
    assert (abs(counts - 225) < 60).all()
    assert {len(example(seed).tokens) for seed in range(9)} == {40}


def test_a_stream_of_it_predicts_the_answers_and_nothing_else() -> None:
    node = {"_target_": "trainer.data.tasks.haystack.HaystackTask", **SIZES, "length": 16}
    stream = open_stream(node, context_length=32, rows=4, seed=0)
    batch, _ = stream.read(stream.start())
    assert batch.predictions() == 4 * 2 * 3 and stream.vocabulary == 14


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 8}, "data.length=8 has no room for 3 pairs and their keys; use data.length=9"),
        ({"min_length": 8}, "data.min_length=8 has no room .* or data.pairs=2"),
        ({"min_length": 50}, "data.min_length=50 is above data.length=40"),
        ({"depth": 1.5}, "data.depth=1.5 is no share of the filler"),
        ({"keys": 2}, "data.keys=2"),
    ],
)
def test_wishes_without_an_example_are_one_message(settings, words: str) -> None:
    with pytest.raises(DataError, match=words):
        example(**settings)
