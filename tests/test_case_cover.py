"""`make test` runs a small set of crossed cases: every value of every axis, and all where the
crossing is the law."""

from itertools import product
from types import SimpleNamespace

import pytest

from tests.support.case_cover import least_cover, mark_what_is_covered


def test_every_value_occurs_in_no_more_cases_than_the_longest_axis_has_values():
    axes = ("abc", "xy", "1234")
    cases = list(product(*axes))
    chosen = [cases[index] for index in sorted(least_cover(cases))]
    assert len(chosen) == 4
    for number, axis in enumerate(axes):
        assert {case[number] for case in chosen} == set(axis)


def test_a_value_that_occurs_once_is_kept():
    cases = [("a", "x"), ("a", "y"), ("b", "x"), ("a", "z")]
    assert least_cover(cases) >= {2, 3}


class Case:
    """A collected case, as far as the cover looks at it."""

    def __init__(self, name: str, axes: tuple[str, ...], *marks: str):
        self.nodeid = f"{name}[{'-'.join(axes)}]"
        self.callspec = SimpleNamespace(_idlist=axes)
        self.marks = list(marks)

    def get_closest_marker(self, name: str) -> str | None:
        return name if name in self.marks else None

    def add_marker(self, name: str) -> None:
        self.marks.append(name)


def test_the_rest_is_marked_and_a_mark_keeps_every_case():
    crossed = [Case("crossed", axes) for axes in product("ab", "xy")]
    law = [Case("law", axes, "every_case") for axes in product("ab", "xy")]
    rows = [Case("rows", (axis,)) for axis in "abc"]
    mark_what_is_covered([*crossed, *law, *rows])
    assert [case.nodeid for case in crossed if "full" not in case.marks] == [
        "crossed[a-x]",
        "crossed[b-y]",
    ]
    assert not any("full" in case.marks for case in [*law, *rows])


@pytest.mark.every_case
@pytest.mark.parametrize("left", ["a", "b"])
@pytest.mark.parametrize("right, more", [("x", 1), ("y", 1)])
def test_what_is_given_together_is_one_axis(left, right, more, request):
    assert len(request.node.callspec._idlist) == 2
