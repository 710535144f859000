"""Half precision over ranks: a cut adds little to what rounding does without one."""

import pytest
import torch

from tests.support.parity import Case, compare_on, covering
from tests.support.pool import ranks

# A cut rounds elsewhere: so often the difference that rounding makes alone, and so much more.
TIMES, MORE = 3.0, 0.03
RANKS = 3


def one_of_each() -> list[Case]:
    """A case of each mixer, methods and layouts in turn."""
    cases: dict[str, list[Case]] = {}
    for case in covering():
        cases.setdefault(case.name, []).append(case)
    return [some[turn % len(some)]._replace(size=RANKS) for turn, some in enumerate(cases.values())]


@pytest.mark.parametrize("case", one_of_each(), ids=str)
def test_a_cut_adds_little_to_rounding(case):
    found = ranks(RANKS, compare_on, case, "cpu", (torch.bfloat16,))
    for worst in found:
        assert worst["bfloat16"] <= TIMES * worst["bfloat16 uncut"] + MORE
