"""Groups runs that differ in their seed alone: means, and the spread over seeds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from trainer.reports.runs import RunRecord

SEED = "seed="


class Spread(NamedTuple):
    """A mean over runs and its standard deviation (n - 1); NaN when unknown, or of a single run."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Variant:
    """Runs of the same settings with any seed.

    Attributes:
        name: the settings that distinguish it, without the seed.
        runs: all of them.
    """

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        """The finished runs, over which figures are taken; all runs when none is finished."""
        finished = tuple(run for run in self.runs if run.finished)
        return finished or self.runs

    @property
    def state(self) -> str:
        """Number of finished runs, and how the others ended."""
        unfinished = [f"{run.name}: {run.state}" for run in self.runs if not run.finished]
        finished = len(self.runs) - len(unfinished)
        if unfinished:
            return f"{finished} of {len(self.runs)} runs; {'; '.join(unfinished)}"
        return "1 run" if finished == 1 else f"{finished} runs"

    def spread(self, figure: Callable[[RunRecord], float]) -> Spread:
        """Returns mean and deviation of one figure over the counted runs that have it."""
        return spread(figure(run) for run in self.counted)


def spread(values: Iterable[float]) -> Spread:
    """Returns mean and deviation of the values that are not NaN."""
    numbers = [value for value in values if not math.isnan(value)]
    mean = math.nan
    deviation = math.nan
    if numbers:
        mean = fmean(numbers)
    if len(numbers) > 1:
        deviation = stdev(numbers)
    return Spread(mean, deviation)


def variants(runs: Sequence[RunRecord]) -> list[Variant]:
    """Groups runs by their settings, best variant first.

    Ordered by held-out loss, or training loss where there is none; variants without a loss come
    last.
    """
    groups: dict[str, list[RunRecord]] = {}
    for run in runs:
        words = [word for word in run.label.split(" ") if not word.startswith(SEED)]
        name = " ".join(words) or "all seeds"
        groups.setdefault(name, []).append(run)
    unsorted = [Variant(name, tuple(group)) for name, group in groups.items()]
    return sorted(unsorted, key=_rank)


def _rank(variant: Variant) -> tuple[bool, float, str]:
    value = quality(variant).mean
    # NaN compares as neither less nor greater, and would leave the order undefined.
    if math.isnan(value):
        return True, 0.0, variant.name
    return False, value, variant.name


def quality(variant: Variant) -> Spread:
    """Returns the held-out loss of a variant, or its training loss when nothing was held out."""
    held_out = variant.spread(lambda run: run.held_out)
    if math.isnan(held_out.mean):
        return variant.spread(lambda run: run.loss)
    return held_out


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Returns the indices of the Pareto frontier of (cost, loss), cheapest first.

    Equal points all stay.
    """
    indices = [index for index, point in enumerate(points) if not _is_beaten(point, points)]
    return sorted(indices, key=lambda index: points[index])


def _is_beaten(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Reports that another point costs no more and has no higher loss."""
    cost, loss = point
    return any(
        other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != point
        for other_cost, other_loss in points
    )
