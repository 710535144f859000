"""Draws loss, and every other evaluation, against what a variant costs."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from trainer.logs.caption import caption
from trainer.reports.runs import RunRecord
from trainer.reports.sheet import GREY, Shape, Style, legend, sheet, style_of
from trainer.reports.variants import Spread, Variant, frontier, quality

COSTS: tuple[tuple[str, Callable[[RunRecord], float]], ...] = (
    ("training FLOPs", lambda run: run.flops_per_token * run.tokens),
    ("training seconds x ranks", lambda run: run.seconds * run.ranks),
    ("peak memory of the fullest rank (MiB)", lambda run: run.peak_bytes / 2**20),
)


def draw_costs(variants: Sequence[Variant], shape: Shape) -> Figure | None:
    """Draws loss against each known cost, and every other evaluation against the first of them.

    The dashed line joins the Pareto frontier: lower losses, and higher shares, are better. Of an
    evaluation that is no share nothing says which way is better, so there is no line.
    """
    panels = []
    for name, cost in COSTS:
        points = _points(variants, cost, quality)
        if points:
            panels.append(_CostPanel(name, "nats per token", points, quality, -1))
    for grade in _graded_names(variants):
        figure_of = partial(_grade_of, grade)
        for name, cost in COSTS[:1]:
            points = _points(variants, cost, figure_of)
            is_share = all(0 <= value <= 1 for _, value in points.values())
            if points:
                better = 1 if is_share else 0
                panels.append(_CostPanel(name, caption(grade), points, figure_of, better))
    if not panels:
        return None
    title = "held-out loss" if _all_held_out(variants) else "loss (held-out where it is known)"
    title = f"{title} against cost, with the spread over seeds: lower left is better"
    if any(panel.better >= 0 for panel in panels):
        title += "; of a share, upper left"
    figure, axes = sheet(len(panels), title, shape)
    for axis, panel in zip(axes, panels):
        _draw_cost_panel(axis, panel, variants)
    legend(figure, axes[0])
    return figure


class _CostPanel(NamedTuple):
    """One panel: what lies on its axes, and by variant where its point is.

    Attributes:
        better: 1 where higher is better, -1 where lower is, 0 where nobody knows.
    """

    cost: str
    value: str
    points: dict[int, tuple[float, float]]
    figure: Callable[[Variant], Spread]
    better: int


def _draw_cost_panel(axis: Axes, panel: _CostPanel, variants: Sequence[Variant]) -> None:
    for number, (cost, value) in panel.points.items():
        deviation = panel.figure(variants[number]).deviation
        error = None if math.isnan(deviation) else deviation
        style: Style = {**style_of(number), "linestyle": ""}
        # Every other marker is hollow and larger, so that one point does not hide an equal one.
        style |= {"fillstyle": "none", "markersize": 10} if number % 2 else {"markersize": 6}
        label = caption(variants[number].name)
        axis.errorbar(cost, value, yerr=error, capsize=3, label=label, **style)
    if panel.better:
        coordinates = list(panel.points.values())
        best = frontier([(cost, -panel.better * value) for cost, value in coordinates])
        costs = [coordinates[index][0] for index in best]
        values = [coordinates[index][1] for index in best]
        axis.plot(costs, values, color=GREY, linestyle="--", linewidth=1, zorder=0)
    axis.set_xlabel(panel.cost)
    axis.set_ylabel(panel.value)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.margins(0.12)


def _graded_names(variants: Sequence[Variant]) -> list[str]:
    """Returns the names of the evaluations beside held-out loss, in the order of the runs."""
    names: dict[str, None] = {}
    for variant in variants:
        for run in variant.counted:
            names |= dict.fromkeys(run.graded)
    return list(names)


def _grade_of(name: str, variant: Variant) -> Spread:
    return variant.spread(lambda run: run.graded.get(name, math.nan))


def _all_held_out(variants: Sequence[Variant]) -> bool:
    """Reports that every run that trained was evaluated as well."""
    for variant in variants:
        for run in variant.counted:
            if run.curve and math.isnan(run.held_out):
                return False
    return True


def _points(
    variants: Sequence[Variant],
    cost: Callable[[RunRecord], float],
    value: Callable[[Variant], Spread],
) -> dict[int, tuple[float, float]]:
    """Returns (cost, value) by the number of the variant, where both are known."""
    points = {}
    for number, variant in enumerate(variants):
        point = (variant.spread(cost).mean, value(variant).mean)
        if not any(math.isnan(value) for value in point):
            points[number] = point
    return points
