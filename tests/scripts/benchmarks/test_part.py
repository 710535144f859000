"""The bench of a part names it as a run does, and measures it beside full attention."""

import pytest

from scripts.benchmarks.part import configs, measure, parse, table
from tests.support.pool import ranks

WORDS = [
    *("mixer._target_=examples.own_mixer.Cosine", "mixer.temperature=0.5", "tokens=24"),
    *("repeats=1", "model.width=16", "model.layers=1", "model.heads=2"),
]


def rows(env, bench):
    return list(measure(bench, env.group))


def test_a_part_of_ones_own_is_measured_beside_full_attention():
    bench = parse(WORDS)
    assert bench.settings == (*WORDS[:2], *WORDS[4:])
    assert configs(bench)["asked"].mixer.settings() == {"temperature": 0.5}
    (found,) = ranks(1, rows, bench)
    assert [(row["model"], row["tokens"]) for row in found] == [
        *(("asked", 24), ("asked", 48)),
        *(("full", 24), ("full", 48)),
    ]
    few, many, full_few, full_many = found
    assert many["growth"] == many["seconds"] / few["seconds"]
    assert many["beside_full"] == many["seconds"] / full_many["seconds"]
    assert full_few["beside_full"] == 1.0
    # The own mixer has a temperature for each head.
    assert few["parameters"] - full_few["parameters"] == 2
    assert "beside full" in table(found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mixer._target_=nosuch.Layer"], "there is no module nosuch"),
        (["ranks=2"], "ranks=2: one device is measured; use ranks=1"),
        (["tokens=x"], "tokens is a whole number of at least 1"),
    ],
)
def test_mistakes_are_one_message(words, message):
    with pytest.raises(ValueError, match=message):
        parse(words)
