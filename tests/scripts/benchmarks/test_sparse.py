"""The bench of sparse attention measures whole layers in one run, beside full attention."""

import pytest

from scripts.benchmarks.sparse import measure, parse, table
from tests.support.pool import ranks

WORDS = ["tokens=128", "width=16", "heads=2", "chunk=8", "hashes=2", "window=8", "repeats=1"]
WORDS += ["larger_block=8"]


def rows(env, sizes):
    return list(measure(sizes, env.group))


def test_sparse_layers_are_measured_beside_full_attention():
    (found,) = ranks(1, rows, parse(WORDS))
    assert [row["name"] for row in found] == [
        "full",
        "lsh, 2 hashes, chunks of 8",
        "compressed, 2 of 32 blocks of 4",
        "compressed, 1 of 16 blocks of 8",
    ]
    for row in found:
        assert row["beside_full"] == row["seconds"] / found[0]["seconds"]
    assert "beside full" in table(found)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ranks=2", "ranks=2: one device is measured"),
        ("tokens=63", "use 64 or more"),
        ("tokens=255", "larger_block=16; use 256 or more"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(word, message):
    with pytest.raises(ValueError, match=message):
        parse([word])
