"""State tracking by permutations: targets are products, in the order in which the permutations
come."""

import numpy as np
import pytest

from trainer.data.tasks.permutations import Permutations, products

# 012 021 102 120 201 210 are 0 to 5


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        ([0, 0, 0], [0, 0, 0]),
        ([1, 1, 2, 2], [1, 0, 2, 0]),  # a transposition twice is nothing
        ([3, 3, 3], [3, 4, 0]),  # a cycle of three
        ([1, 2], [1, 3]),  # 0 stays, then goes to 1; 1 goes to 2 and stays; 2 goes to 1, then to 0
        ([2, 1], [2, 4]),  # and in the other order something else
    ],
)
def test_products_are_made_in_the_order_of_the_tokens(tokens: list[int], want: list[int]) -> None:
    assert products(np.array(tokens), 3).tolist() == want


def test_examples_have_the_lengths_asked_for_and_a_target_at_every_token() -> None:
    task, random = Permutations(elements=4, min_length=3, max_length=5), np.random.default_rng(0)
    drawn = [task.example(random) for _ in range(200)]
    assert {len(each.tokens) for each in drawn} == {3, 4, 5} and task.longest == 5
    assert task.vocabulary == 24 and len({int(t) for each in drawn for t in each.tokens}) == 24
    assert all(each.targets.tolist() == products(each.tokens, 4).tolist() for each in drawn)  # pyright: ignore
    assert task.tokenizer().decode([0, 23]) == "0123 3210"


def test_swaps_are_the_only_tokens_where_they_are_asked_for_and_lead_everywhere() -> None:
    example = Permutations(min_length=200, max_length=200, swaps=True).example(
        np.random.default_rng(0)
    )
    assert set(example.tokens.tolist()) == {0, 1, 2, 5}
    assert set(example.targets.tolist()) == set(range(6))  # pyright: ignore


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"elements": 7}, "use at most 6"),
        ({"elements": 1}, "data.elements=1"),
        ({"min_length": 9, "max_length": 8}, "data.min_length=9"),
    ],
)
def test_sizes_that_cannot_be_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Permutations(**settings)
