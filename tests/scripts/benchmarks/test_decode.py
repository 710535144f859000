"""The decode bench steps both sides behind the same number of keys, and a recurrent model."""

from scripts.benchmarks.decode import MODELS, DecodeSizes, compared, parse, recurrent_steps, twins


def test_both_sides_are_stepped_and_compared():
    theirs, ours = twins(*MODELS["quickstart"])
    row = compared(ours, theirs, 2, 24, DecodeSizes(blocks=1, threads=1))
    assert row["ours"] > 0 and row["theirs"] > 0
    assert row["ratio"] == row["ours"] / row["theirs"]
    assert (row["batch"], row["context"], row["parameters"]) == (2, 24, 2_460_480)


def test_a_recurrent_state_does_not_grow():
    rows = list(recurrent_steps(parse(["recurrent=600", "blocks=1", "threads=1"])))
    assert [row["context"] for row in rows] == [512, 600]
    assert rows[0]["bytes"] == rows[1]["bytes"]
    assert rows[0]["of_first"] == 1.0 and rows[1]["of_first"] > 0
