"""Which cases of a test with several crossed parameters `make test` runs.

A crossing of three axes of ten values has a thousand cases, and few of them find what no other
finds. `make test` runs a small set in which every value of every axis occurs; the others get the
mark `full` and run in `make test-all`. Where the pairs themselves are the law of a test, its mark
`every_case` keeps all of them.
"""

from collections import defaultdict
from collections.abc import Sequence

import pytest


def least_cover(cases: Sequence[Sequence[str]]) -> set[int]:
    """Returns the indices of a small set of cases in which every value of every axis occurs.

    Greedy: the case with the most values that are still missing, the first of several.

    Args:
        cases: of each case its value on every axis.
    """
    missing = {pair for case in cases for pair in enumerate(case)}
    chosen: set[int] = set()
    while missing:
        gains = [len(missing.intersection(enumerate(case))) for case in cases]
        best = gains.index(max(gains))
        chosen.add(best)
        missing.difference_update(enumerate(cases[best]))
    return chosen


def mark_what_is_covered(items: Sequence[pytest.Item]) -> None:
    """Gives the mark `full` to the cases that a smaller set of the same test covers."""
    crossed: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        alone = item.get_closest_marker("full") or item.get_closest_marker("every_case")
        if not alone and len(_axes(item)) > 1:
            crossed[item.nodeid.split("[")[0]].append(item)
    for group in crossed.values():
        chosen = least_cover([_axes(item) for item in group])
        for index, item in enumerate(group):
            if index not in chosen:
                item.add_marker("full")


def _axes(item: pytest.Item) -> Sequence[str]:
    """The identifier that the case has of each `parametrize`; none of a test without any."""
    callspec = getattr(item, "callspec", None)
    return () if callspec is None else callspec._idlist
