"""Repeated random tokens: what is repeated, what is predicted, what is refused."""

import numpy as np
import pytest

from trainer.data.errors import DataError
from trainer.data.tasks.repeated import Repeated


def test_the_second_half_is_the_first_and_alone_predicted() -> None:
    task = Repeated(vocabulary=9, min_length=3, max_length=9)
    lengths = set()
    for seed in range(60):
        example = task.example(np.random.default_rng(seed))
        tokens = example.tokens
        given = example.given
        length = len(tokens) // 2
        lengths.add(length)
        assert example.targets is None and example.source is None
        assert np.array_equal(tokens[:length], tokens[length:])
        assert len(set(tokens.tolist())) == length
        # Token 0 ends a sample and stands in no example.
        assert tokens.min() >= 1 and tokens.max() <= 9 < task.vocabulary
        assert given[:length].all() and not given[length:].any()
    assert lengths == set(range(3, 10))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vocabulary": 8, "max_length": 9}, "use data.vocabulary=9 or more"),
        ({"min_length": 5, "max_length": 4}, "use data.max_length=5 or more"),
        ({"min_length": 1}, "from 2 on"),
    ],
)
def test_examples_that_cannot_be_are_refused(settings, said) -> None:
    with pytest.raises(DataError, match=said):
        Repeated(**settings)
