"""`bench context`: the planned context ends under its memory, a longer one does not."""

import pytest

from scripts.benchmarks import context


def test_several_ranks_are_refused():
    with pytest.raises(ValueError, match="ranks=2: one rank is limited at a time"):
        context.parse(["ranks=2"])


@pytest.mark.full
def test_the_planned_context_is_the_largest_that_fits():
    (row,) = context.measure_cases(context.ContextSizes(memory=128), context.CASES[:1])
    assert row["context"] > 1024
    assert row["at_context"] == context.ENDED
    assert row["at_longer"] == context.FULL
