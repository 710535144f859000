"""Shares of the sources of a mixture: which source gives the next row.

Letters: T tokens of a full row.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Weight = float | Sequence[tuple[int, float]]


class Ledger(NamedTuple):
    """The tokens that each source has given and should have given, by its name."""

    given: dict[str, int]
    wished: dict[str, float]


class Weights:
    """Weights of sources by tokens, which may change from step to step.

    Args:
        weights: {name: weight, or [(step, weight), ...]}; between two steps a weight changes
            evenly, before the first and after the last it stays.

    Raises:
        ValueError: a weight is no number from 0 on, or at some step none is above 0.
    """

    def __init__(self, weights: Mapping[str, Any]):
        self.points: dict[str, list[tuple[int, float]]] = {}
        for name, weight in weights.items():
            self.points[name] = _points(name, weight)
        self.constant = all(len(points) == 1 for points in self.points.values())
        for step in sorted({step for points in self.points.values() for step, _ in points}):
            if not sum(_at(points, step) for points in self.points.values()):
                where = "" if self.constant else f" at step {step}"
                raise ValueError(
                    f"data.weights={_written(weights)}: they add up to 0{where}; give one source a"
                    " weight above 0"
                )

    def shares(self, step: int, live: Sequence[str]) -> dict[str, float]:
        """Returns the shares of some sources at a step, which add up to 1; all 0 if no weight is.

        Args:
            step: of the run, from 0.
            live: the names of those that still give rows.
        """
        weights = {name: _at(self.points[name], step) for name in live}
        total = sum(weights.values())
        return {name: weight / total if total else 0.0 for name, weight in weights.items()}


def next_source(ledger: Ledger, shares: Mapping[str, float], row: int) -> str:
    """Returns the source of the next row.

    Of the sources whose next row is due to begin before the row ends, it is the one whose row is
    due to be finished first. For full rows and constant shares, what a source has given is less
    than one row away from its share at any time (Baruah et al. 1996, "Proportionate progress",
    Algorithmica 15: one processor, earliest deadline first).

    Args:
        ledger: what was given and wished so far.
        shares: of the sources that can be chosen; one at least is above 0.
        row: T.
    """
    deadlines: dict[str, float] = {}
    lags: dict[str, float] = {}
    for name, share in shares.items():
        lag = ledger.wished[name] - ledger.given[name]
        lags[name] = lag + share * row
        if share and lags[name] > 0:
            deadlines[name] = (row - lag) / share
    # Rounding may leave no source with a row that is due.
    if not deadlines:
        return max(lags, key=lambda name: lags[name])
    return min(deadlines, key=lambda name: deadlines[name])


def account(ledger: Ledger, shares: Mapping[str, float], name: str, tokens: int) -> Ledger:
    """Returns the ledger after a source has given a row of so many tokens."""
    wished = dict(ledger.wished)
    for each, share in shares.items():
        wished[each] += share * tokens
    return Ledger({**ledger.given, name: ledger.given[name] + tokens}, wished)


def retire(ledger: Ledger, shares: Mapping[str, float], name: str) -> Ledger:
    """Returns the ledger after a source has ended: the others give what it still owes.

    Args:
        ledger: before.
        shares: of the others.
        name: of the source.
    """
    debt = ledger.wished[name] - ledger.given[name]
    wished = {**ledger.wished, name: float(ledger.given[name])}
    for each, share in shares.items():
        wished[each] += share * debt
    return Ledger(ledger.given, wished)


def _points(name: str, weight: Any) -> list[tuple[int, float]]:
    """Returns the (step, weight) pairs of a weight."""
    pairs = weight if isinstance(weight, list | tuple) else [[0, weight]]
    points: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not _is_pair(*pair):
            raise ValueError(
                f"data.weights.{name}={_written(weight)}: a number from 0 on is needed, or a list"
                " as [[0,1],[1000,3]] of steps with their weights"
            )
        points.append((pair[0], float(pair[1])))
    steps = [step for step, _ in points]
    if not steps or steps != sorted(set(steps)):
        raise ValueError(
            f"data.weights.{name}={_written(weight)}: each step must be above the one before"
        )
    return points


def _is_pair(step: Any, weight: Any) -> bool:
    numbers = not isinstance(step, bool) and not isinstance(weight, bool)
    return (
        numbers
        and isinstance(step, int)
        and step >= 0
        and isinstance(weight, int | float)
        and 0 <= weight < 1e18
    )


def _at(points: list[tuple[int, float]], step: int) -> float:
    """Returns the weight at a step."""
    before = points[0]
    for point in points:
        if point[0] > step:
            if point is before:
                break
            share = (step - before[0]) / (point[0] - before[0])
            return before[1] + share * (point[1] - before[1])
        before = point
    return before[1]


def _written(value: Any) -> str:
    """Returns a value as the command line writes it."""
    return str(value).replace(" ", "").replace("'", "")[:80]
