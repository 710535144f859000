"""Draws the plots of a report: curves, loss against cost, loss by position, evaluations."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from trainer.files.safe_files import replace_inside
from trainer.logs.caption import caption
from trainer.reports.cost_plots import draw_costs
from trainer.reports.sheet import (
    GREY,
    WIDE,
    Shape,
    Style,
    legend,
    png,
    sheet,
    spaced_markers,
    style_of,
)
from trainer.reports.variants import Variant

SMOOTHING = 30  # a smoothed point is a mean over about a fifteenth of its curve
Curve = list[tuple[float, float]]


def draw(variants: Sequence[Variant], directory: Path) -> dict[str, Path]:
    """Draws the plots that the runs allow as PNG files; returns their paths by name."""
    paths = {}
    for name, figure in figures(variants, WIDE).items():
        path = directory / f"{name}.png"
        # An earlier report may have had a plot that these runs do not have.
        path.unlink(missing_ok=True)
        if figure is not None:
            inside = f"{directory.name}/{path.name}"
            paths[name] = replace_inside(directory.parent, inside, png(figure))
    return paths


def figures(variants: Sequence[Variant], shape: Shape) -> dict[str, Figure | None]:
    """Returns every plot in one shape; None for those that the runs do not allow."""
    return {
        "curves": _curves(variants, shape),
        "pareto": draw_costs(variants, shape),
        "by_position": _by_position(variants, shape),
        "evaluations": _evaluations(variants, shape),
    }


def _curves(variants: Sequence[Variant], shape: Shape) -> Figure | None:
    """Draws smoothed training loss and held-out loss; a shade covers the seeds of a variant."""
    has_curve = False
    has_checks = False
    for variant in variants:
        curves = [run for run in variant.runs if run.curve]
        if curves:
            has_curve = True
            # Held-out losses of a variant without a curve open no panel.
            has_checks = has_checks or any(run.checks for run in variant.runs)
    if not has_curve:
        return None
    figure, axes = sheet(1 + has_checks, "loss while training (nats per token)", shape)
    for number, variant in enumerate(variants):
        style = style_of(number)
        name = caption(variant.name)
        smoothed = [_smoothed(run.curve) for run in variant.counted if run.curve]
        _band(axes[0], smoothed, name, style, number)
        if has_checks:
            checks = [run.checks for run in variant.counted if run.checks]
            _band(axes[1], checks, name, style, number)
    for panel, title in zip(axes, ("training, smoothed", "held out")):
        _label_panel(panel, title)
    legend(figure, axes[0])
    return figure


def _label_panel(panel: Axes, title: str) -> None:
    """Titles a panel whose x-axis is tokens trained on."""
    panel.set_title(title, fontsize=10, color=GREY)
    panel.set_xlabel("tokens trained on")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))


def _smoothed(curve: Curve) -> Curve:
    """Averages each point with as many neighbours on either side, so that slopes do not shift."""
    largest_radius = len(curve) // SMOOTHING
    last = len(curve) - 1
    smoothed = []
    for index, (tokens, _) in enumerate(curve):
        # Near the ends the radius shrinks, because a one-sided mean would bend the curve.
        radius = min(largest_radius, index, last - index)
        neighbours = curve[index - radius : index + radius + 1]
        smoothed.append((tokens, fmean(value for _, value in neighbours)))
    return smoothed


def _band(axes: Axes, curves: Sequence[Curve], name: str, style: Style, number: int) -> None:
    """Draws the mean of curves and a shade from the lowest to the highest.

    Ends with the shortest curve: seeds of one variant have their rows at the same steps.
    """
    points = list(zip(*curves))
    if not points:
        return
    tokens = []
    means = []
    lowest = []
    highest = []
    for point in points:
        values = [value for _, value in point]
        tokens.append(fmean(position for position, _ in point))
        means.append(fmean(values))
        lowest.append(min(values))
        highest.append(max(values))
    marked = spaced_markers(len(tokens), number)
    axes.plot(tokens, means, label=name, linewidth=1.6, markersize=5, markevery=marked, **style)
    if len(curves) > 1:
        axes.fill_between(tokens, lowest, highest, color=style["color"], alpha=0.15, lw=0)


def _by_position(variants: Sequence[Variant], shape: Shape) -> Figure | None:
    """Draws mean held-out loss at each distance into a document."""
    losses_by_variant = [by_position(variant) for variant in variants]
    if not any(losses_by_variant):
        return None
    title = "held-out loss by position in the document (nats per token)"
    figure, [axes] = sheet(1, title, shape)
    for number, (variant, losses) in enumerate(zip(variants, losses_by_variant)):
        if not losses:
            continue
        # Ranges double in length, so that the geometric mean is their middle on a log axis.
        middles = [((begin + 1) * end) ** 0.5 for begin, end in losses]
        axes.plot(
            middles,
            list(losses.values()),
            label=caption(variant.name),
            linewidth=1.6,
            markersize=4,
            **style_of(number),
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("position (tokens, ranges twice as long each)")
    legend(figure, axes)
    return figure


def _evaluations(variants: Sequence[Variant], shape: Shape) -> Figure | None:
    """Draws accuracies and other evaluations while training, a panel each."""
    # A dictionary keeps the order in which runs name them. A single value is not a curve.
    names: dict[str, None] = {}
    for variant in variants:
        for run in variant.counted:
            for name, points in run.grades.items():
                if len(points) > 1:
                    names[name] = None
    if not names:
        return None
    figure, axes = sheet(len(names), "evaluations while training", shape)
    for panel, name in zip(axes, names):
        values = []
        for number, variant in enumerate(variants):
            curves = [run.grades[name] for run in variant.counted if run.grades.get(name)]
            for curve in curves:
                values += [value for _, value in curve]
            _band(panel, curves, caption(variant.name), style_of(number), number)
        _label_panel(panel, caption(name))
        # Accuracies share one scale, so that panels can be compared.
        if min(values) >= 0 and max(values) <= 1:
            panel.set_ylim(-0.03, 1.03)
    fullest = max(axes, key=lambda panel: len(panel.get_lines()))
    legend(figure, fullest)
    return figure


def by_position(variant: Variant) -> dict[tuple[int, int], float]:
    """Returns mean losses over the counted runs by (begin, end), in order."""
    losses: dict[tuple[int, int], list[float]] = {}
    for run in variant.counted:
        for position, loss in run.by_position.items():
            losses.setdefault(position, []).append(loss)
    means = {}
    for position in sorted(losses):
        means[position] = fmean(losses[position])
    return means
