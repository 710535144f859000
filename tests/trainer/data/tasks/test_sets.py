"""Sets: the answer is that of the elements in any order, and stands at the first of them."""

import numpy as np
import pytest

from models.loss import IGNORE
from trainer.data.errors import DataError
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.sets import Sets, latin_letters


@pytest.mark.parametrize(
    ("task", "elements", "answer"),
    [
        ("distinct", [5, 5, 2, 9], 3),
        ("distinct", [7, 7, 7], 1),
        ("max", [5, 5, 2, 9], 9),
        ("max", [3], 3),
    ],
)
def test_answers(task, elements, answer):
    assert Sets(task=task).answer(np.array(elements)) == answer


def test_characters_are_the_same_letter_in_either_case_and_with_any_accent():
    task = Sets(task="characters")
    token = {word: number for number, word in enumerate(task.words)}
    asked = np.array([token[character] for character in "aA\u00e1\u00c5bz\u017b"])
    assert task.answer(asked) == 3
    characters, letters = latin_letters()
    assert set(letters) == set(range(26)) and len(set(characters)) == len(characters) > 200


@pytest.mark.parametrize("task", ["distinct", "max", "characters"])
def test_an_example_is_asked_about_once(task):
    sets, random = Sets(task=task, min_size=1, max_size=4), np.random.default_rng(0)
    drawn = [sets.example(random) for _ in range(200)]
    assert {len(each.tokens) for each in drawn} == {1, 2, 3, 4} and sets.longest == 4
    for example in drawn:
        assert example.targets is not None
        assert example.targets[0] == sets.answer(example.tokens)
        assert (example.targets[1:] == IGNORE).all()
        assert max(example.tokens.max(), example.targets[0]) < sets.vocabulary
    assert len(sets.tokenizer().words) == sets.vocabulary


def test_orders_of_a_held_out_set_are_held_out_too():
    task = Sets(min_size=2, max_size=2, symbols=5, held_out=0.3)
    seen = []
    for split in ("train", "held_out"):
        stream = SyntheticStream(task, context_length=64, rows=8, seed=0, split=split)
        batch, _ = stream.read(stream.start())
        sets = set()
        for row, doc in zip(batch.tokens, batch.doc, strict=True):
            for number in range(int(doc.max()) + 1):
                sets.add(tuple(sorted(row[doc == number].tolist())))
        seen.append(sets)
    assert len(seen[0]) + len(seen[1]) == 15 and not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_size": 0}, r"data\.min_size=0: a set of nothing has no answer; use 1 or more"),
        ({"min_size": 9, "max_size": 8}, r"data\.min_size=9 is above data\.max_size=8"),
        ({"task": "median"}, r"data\.task=median is unknown; use distinct, max, characters"),
        ({"symbols": 1}, r"data\.symbols=1"),
    ],
)
def test_sets_that_cannot_be_are_refused(settings, words):
    with pytest.raises(DataError, match=words):
        Sets(**settings)
