"""The bench of experts measures what it says, with the bytes of the formula."""

import pytest

from scripts.benchmarks.experts import ExpertSizes, measure, parse, table
from tests.support.pool import ranks


def rows(env, sizes):
    return list(measure(sizes, env.group))


@pytest.mark.full
def test_every_way_is_measured_and_sends_what_it_should():
    for found in ranks(
        4, rows, ExpertSizes(tokens=64, width=8, ffn=8, experts=4, ranks=4, repeats=1)
    ):
        assert len(found) == 10 and all(row["seconds"] > 0 for row in found)
        shared = [row for row in found if "sent_bytes" in row]
        assert [row["name"] for row in shared] == ["experts, both shared"] * 2
        assert all(
            row["sent_bytes"] == row["formula_bytes"] and min(row["sent_bytes"]) > 0
            for row in shared
        )
        assert all(row["balance"] >= 1 for row in shared) and table(found).count("equal") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["heads=2"], "no setting 'heads'"),
        (["tokens=0"], "at least 1"),
        (["ranks=1"], "shares nothing"),
        (["ranks=3"], "do not divide experts=8"),
        (["experts=1", "ranks=2"], "do not divide"),
    ],
)
def test_words_that_mean_nothing_are_named(words, told):
    with pytest.raises(ValueError, match=told):
        parse(words)
    assert parse(["tokens=64", "experts=4"]).tokens == 64
