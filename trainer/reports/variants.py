"""Runs that differ in their seed alone, taken together: means, and the spread over seeds."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import NamedTuple

from trainer.reports.runs import RunRecord

SEED = "seed="


class Spread(NamedTuple):
    """A mean over runs, and their standard deviation (n - 1); NaN where it is not known, or of one
    run."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Variant:
    """Runs of the same settings, whatever their seed.

    Attributes: name: the settings that set it apart, without the seed. runs: all of them. counted:
        those that figures are taken over: the finished ones, or, where none is, what there is.
    """

    name: str
    runs: tuple[RunRecord, ...]

    @property
    def counted(self) -> tuple[RunRecord, ...]:
        return tuple(run for run in self.runs if run.finished) or self.runs

    @property
    def state(self) -> str:
        """How many runs the figures are of, and what became of the others."""
        done = sum(run.finished for run in self.runs)
        if done == len(self.runs):
            return "1 run" if done == 1 else f"{done} runs"
        others = [f"{run.name}: {run.state}" for run in self.runs if not run.finished]
        return f"{done} of {len(self.runs)} runs; {'; '.join(others)}"

    def spread(self, figure: Callable[[RunRecord], float]) -> Spread:
        """Of one figure, over the runs that know it."""
        return spread(figure(run) for run in self.counted)


def spread(values: Iterable[float]) -> Spread:
    """Of the values that are known."""
    known = [value for value in values if not math.isnan(value)]
    return Spread(fmean(known) if known else math.nan, stdev(known) if len(known) > 1 else math.nan)


def variants(runs: Sequence[RunRecord]) -> list[Variant]:
    """Best first: by held-out loss, where there is none by training loss, and those without any
    last."""
    found: dict[str, list[RunRecord]] = {}
    for run in runs:
        plain = " ".join(word for word in run.label.split(" ") if not word.startswith(SEED))
        found.setdefault(plain or "all seeds", []).append(run)
    return sorted((Variant(name, tuple(of)) for name, of in found.items()), key=_goodness)


def _goodness(variant: Variant) -> tuple[bool, float, str]:
    value = quality(variant).mean
    return math.isnan(value), 0.0 if math.isnan(value) else value, variant.name


def quality(variant: Variant) -> Spread:
    """What a variant is judged by: its held-out loss, or its training loss where nothing was held
    out."""
    held_out = variant.spread(lambda run: run.held_out)
    return variant.spread(lambda run: run.loss) if math.isnan(held_out.mean) else held_out


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which (cost, loss) are beaten by no other, cheapest first (Pareto); equal ones all stay."""

    def beaten(one: tuple[float, float]) -> bool:
        return any(other != one and other[0] <= one[0] and other[1] <= one[1] for other in points)

    return sorted(
        (at for at, one in enumerate(points) if not beaten(one)), key=lambda at: points[at]
    )
