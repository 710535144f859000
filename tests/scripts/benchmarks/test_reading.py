"""The bench `reading` measures every way to read, and a rank's own rows on many data ranks."""

import pytest

from scripts.benchmarks import reading


def test_every_way_is_measured():
    sizes = reading.parse(["tokens=4096", "context=2", "steps=2", "step_ms=100", "row_tokens=256"])
    rows = list(reading.measure(sizes, None))
    ways, dealt = rows[:3], rows[3:]
    assert [row["way"] for row in ways] == list(reading.WAYS)
    assert all(row["documents"] >= 1 and row["wait_s"] > 0 for row in ways)
    assert ways[0]["thread_s"] == 0 < ways[2]["thread_s"], "there is a thread where it reads ahead"
    assert [row["data_ranks"] for row in dealt] == list(reading.DATA_RANKS)
    assert all(row["own_s"] > 0 and row["whole_s"] > 0 for row in dealt)
    assert "planned ahead" in reading.table(rows) and "data ranks" in reading.table(rows)


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks=2: one rank is played"):
        reading.parse(["ranks=2"])
