"""Shares of a mixture hold to within one row at any time."""

import random

import pytest

from trainer.data.apportion import Ledger, Weights, account, next_source, retire

ROW = 64
UNEQUAL = {"large": 1000, "small": 1, "tiny": 0.01}
CHANGING = {
    "a": [[0, 1], [500, 0]],
    "b": [[0, 0], [300, 0.2], [500, 1]],
    "c": [[100, 0.1], [101, 2], [900, 0.1]],
}
DRAW = random.Random(1)
MANY = {f"s{number}": DRAW.random() ** 4 + 1e-4 for number in range(20)}


@pytest.mark.parametrize("weights", [UNEQUAL, CHANGING, MANY], ids=["unequal", "changing", "many"])
@pytest.mark.parametrize("fewest", [64, 40, 1])
def test_no_source_is_ever_a_row_from_its_share(weights, fewest):
    draw = random.Random(2)
    judge = Weights(weights)
    names = list(weights)
    ledger = Ledger(dict.fromkeys(names, 0), dict.fromkeys(names, 0.0))
    wished = dict.fromkeys(names, 0.0)
    given = dict.fromkeys(names, 0)
    for row in range(5000):
        shares = judge.shares(row // 4, names)
        assert sum(shares.values()) == pytest.approx(1)
        name = next_source(ledger, shares, ROW)
        tokens = draw.randint(fewest, ROW)
        ledger = account(ledger, shares, name, tokens)
        given[name] += tokens
        for each in names:
            wished[each] += shares[each] * tokens
            assert abs(given[each] - wished[each]) < ROW
    assert ledger.given == given


def test_the_others_take_over_what_an_ended_source_owes():
    ledger = Ledger({"a": 10, "b": 60, "c": 30}, {"a": 40.0, "b": 40.0, "c": 20.0})
    after = retire(ledger, {"b": 0.5, "c": 0.5}, "a")
    assert after == Ledger(ledger.given, {"a": 10.0, "b": 55.0, "c": 35.0})


def test_weights_change_evenly_between_steps():
    judge = Weights({"a": [[10, 1], [20, 3]], "b": 1})
    found = [judge.shares(step, ["a", "b"])["a"] for step in (0, 10, 15, 20, 99)]
    assert found == [1 / 2, 1 / 2, 2 / 3, 3 / 4, 3 / 4]
    assert judge.shares(0, ["b"]) == {"b": 1.0}


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"a": 0, "b": 0.0}, r"data\.weights=\{a:0,b:0\.0\}: they add up to 0;"),
        ({"a": [[0, 1], [9, 0]], "b": 0}, "they add up to 0 at step 9"),
        ({"a": -1}, r"data\.weights\.a=-1: a number from 0 on"),
        ({"a": float("nan")}, r"data\.weights\.a=nan: a number from 0 on"),
        ({"a": "many"}, r"data\.weights\.a=many: a number from 0 on"),
        ({"a": True}, r"data\.weights\.a=True: a number"),
        ({"a": [[5, 1], [5, 2]]}, "each step must be above the one before"),
        ({"a": []}, "each step must be above"),
        ({"a": [[0.5, 1]]}, "a number from 0 on is needed, or a list"),
    ],
)
def test_weights_that_mean_nothing_are_one_message(weights, message):
    with pytest.raises(ValueError, match=message):
        Weights(weights)
