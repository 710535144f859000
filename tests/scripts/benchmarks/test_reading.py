"""The bench `reading` measures both ways, and a step waits less where its batch was read ahead."""

import pytest

from scripts.benchmarks import reading


def test_both_ways_are_measured():
    sizes = reading.parse(["tokens=4096", "steps=2", "step_ms=200"])
    rows = list(reading.measure(sizes, None))
    assert [row["ahead"] for row in rows] == [0, 1]
    assert all(row["documents"] >= 1 and row["wait_s"] > 0 for row in rows)
    assert "1 steps" in reading.table(rows)


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks=2: one rank is played"):
        reading.parse(["ranks=2"])
