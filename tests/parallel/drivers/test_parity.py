"""Every mixer, cut over ranks, gives the outputs and gradients that it gives on one device."""

import pytest

from tests.support.parity import EXACT, covering, differences, everything


def check(case, note):
    """Compare, and leave the figures in the report, from which scripts.parity prints its table."""
    found = differences(case)
    for dtype, worst in found.items():
        note(str(dtype).removeprefix("torch."), worst)
    for dtype, worst in found.items():
        assert worst < EXACT[dtype], f"{case} in {dtype}"


@pytest.mark.parametrize("case", covering(), ids=str)
def test_a_cut_is_invisible(case, record_property):
    check(case, record_property)


@pytest.mark.full
@pytest.mark.parametrize("case", [case for case in everything() if case not in covering()], ids=str)
def test_every_cut_is_invisible(case, record_property):
    check(case, record_property)
