"""The bench of memories measures full ones, and the attention by which they differ."""

import pytest

from scripts.benchmarks.memory import TIMES, MemoryBenchmark, MemorySizes, measure, parse, table
from tests.support.pool import ranks

SIZES = MemorySizes(tokens=32, heads=2, width=8, repeats=1)


def rows(env, sizes):
    return list(measure(sizes, env.group))


def test_each_position_is_measured_with_what_a_lane_carries():
    (found,) = ranks(1, rows, SIZES)
    assert [row["position"] for row in found] == ["rope", "relative"]
    for row in found:
        assert row["bytes"] == TIMES * 32 * 16 * 4
        assert min(row["few_seconds"], row["more_seconds"], row["added_seconds"]) > 0
        assert row["ratio"] == (row["more_seconds"] - row["few_seconds"]) / row["added_seconds"]
    assert "relative" in table(found)


def test_what_is_measured_recalls_a_full_memory():
    step, past = MemoryBenchmark(SIZES).reading("rope", TIMES * 32)
    step()
    assert past.addresses[TIMES * 32].valid().all()
    assert (past.kept["mixer.recall"][1].abs().amax(-1) > 0).all()


def test_more_ranks_than_one_are_refused():
    with pytest.raises(ValueError, match="use ranks=1"):
        parse(["ranks=2"])
