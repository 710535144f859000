"""Which cases of a test with several crossed parameters `make test` runs.

A crossing of three axes of ten values has a thousand cases, and few of them find what no other
finds. `make test` runs a small set in which every value of every axis occurs; the others get the
mark `full` and run in `make test-all`. Where the pairs themselves are the law of a test, its mark
`every_case` keeps all of them.

The mark `short("id", ...)` names the cases that `make test` runs of a test whose cases are long
each, and `full` is given to all others.
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
    named: dict[str, set[str]] = {}
    for item in items:
        short = item.get_closest_marker("short")
        if short:
            # A name that is no case any more would leave a test without any.
            left = named.setdefault(item.nodeid.split("[")[0], set(short.args))
            case = item.nodeid.partition("[")[2].removesuffix("]")
            left.discard(case)
            if case not in short.args:
                item.add_marker("full")
            continue
        alone = item.get_closest_marker("full") or item.get_closest_marker("every_case")
        if not alone and len(_axes(item)) > 1:
            crossed[item.nodeid.split("[")[0]].append(item)
    for group in crossed.values():
        chosen = least_cover([_axes(item) for item in group])
        for index, item in enumerate(group):
            if index not in chosen:
                item.add_marker("full")
    absent = {test: cases for test, cases in named.items() if cases}
    if absent and not _chosen_by_name(items):
        raise pytest.UsageError(f"short names cases that are not there: {absent}")


def _chosen_by_name(items: Sequence[pytest.Item]) -> bool:
    """Whether the command line names cases, so that others of a test are not collected."""
    return bool(items) and any("[" in word for word in items[0].config.args)


def _axes(item: pytest.Item) -> Sequence[str]:
    """The identifier that the case has of each `parametrize`; none of a test without any."""
    callspec = getattr(item, "callspec", None)
    return () if callspec is None else callspec._idlist
