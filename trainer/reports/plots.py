"""Draws the plots of a report: curves, loss against cost, loss by position, evaluations."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from trainer.files.safe_files import replace_inside
from trainer.logs.caption import caption
from trainer.reports.runs import RunRecord
from trainer.reports.variants import Variant, frontier, quality

GREY = "#4a5568"
PALE = "#e2e8f0"
MARKERS = "osD^vPX*<>"
ACROSS = 3  # panels side by side
LEGEND_POINTS = 9  # size of the letters of a legend
LEGEND_SHARE = 0.96  # of a sheet's width that a legend may take
LETTER = 0.6  # mean width of a letter, of its size
SMOOTHING = 30  # a smoothed point is a mean over about a fifteenth of its curve
Curve = list[tuple[float, float]]
Style = dict[str, Any]
COSTS: tuple[tuple[str, Callable[[RunRecord], float]], ...] = (
    ("training FLOPs", lambda run: run.flops_per_token * run.tokens),
    ("training seconds x ranks", lambda run: run.seconds * run.ranks),
    ("peak memory of the fullest rank (MiB)", lambda run: run.peak_bytes / 2**20),
)


def draw(variants: Sequence[Variant], directory: Path) -> dict[str, Path]:
    """Draws the plots that the runs allow as PNG files; returns their paths by name."""
    figures = {
        "curves": _curves(variants),
        "pareto": _pareto(variants),
        "by_position": _by_position(variants),
        "evaluations": _evaluations(variants),
    }
    paths = {}
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        # An earlier report may have had a plot that these runs do not have.
        path.unlink(missing_ok=True)
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            inside = f"{directory.name}/{path.name}"
            paths[name] = replace_inside(directory.parent, inside, buffer.getvalue())
    return paths


def _style(number: int) -> Style:
    """Returns colour and marker of a variant, the same in every plot."""
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    # The marker changes when the colours begin again, so that a hundred variants differ.
    marker = MARKERS[number // len(colours) % len(MARKERS)]
    return {"color": colours[number % len(colours)], "marker": marker}


def _sheet(panels: int, title: str, width: float = 5.4) -> tuple[Figure, list[Axes]]:
    """Makes a figure of some panels, at most ACROSS side by side."""
    columns = min(panels, ACROSS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, 4.8 * rows), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=GREY)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    del axes[panels:]
    for panel in axes:
        panel.grid(color=PALE, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(colors=GREY)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the panels, in as many columns as fit, and makes the sheet higher."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    room = figure.bbox.width * LEGEND_SHARE
    letter_width = LEGEND_POINTS * LETTER * figure.dpi / 72
    # Eight letters are left for the line before each name.
    letters = int(room / letter_width) - 8
    labels = [textwrap.fill(label, max(letters, 16)) for label in labels]
    renderer = FigureCanvasAgg(figure).get_renderer()
    # The width of a legend is known only when it is there: try from many columns to one.
    for columns in range(min(4, len(labels)), 0, -1):
        legend = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=LEGEND_POINTS,
        )
        size = legend.get_window_extent(renderer)
        if size.width <= room or columns == 1:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)


def _curves(variants: Sequence[Variant]) -> Figure | None:
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
    figure, axes = _sheet(1 + has_checks, "loss while training (nats per token)")
    for number, variant in enumerate(variants):
        style = _style(number)
        name = caption(variant.name)
        smoothed = [_smoothed(run.curve) for run in variant.counted if run.curve]
        # A training curve has too many points for markers.
        _band(axes[0], smoothed, name, {**style, "marker": ""})
        if has_checks:
            checks = [run.checks for run in variant.counted if run.checks]
            _band(axes[1], checks, name, style)
    for panel, title in zip(axes, ("training, smoothed", "held out")):
        _label_panel(panel, title)
    _legend(figure, axes[0])
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


def _band(axes: Axes, curves: Sequence[Curve], name: str, style: Style) -> None:
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
    axes.plot(tokens, means, label=name, linewidth=1.6, markersize=5, **style)
    if len(curves) > 1:
        axes.fill_between(tokens, lowest, highest, color=style["color"], alpha=0.15, lw=0)


def _pareto(variants: Sequence[Variant]) -> Figure | None:
    """Draws loss against each known cost; the dashed line joins the Pareto frontier."""
    panels = []
    for name, cost in COSTS:
        points = _points(variants, cost)
        if points:
            panels.append((name, points))
    if not panels:
        return None
    title = "held-out loss" if _all_held_out(variants) else "loss (held-out where it is known)"
    figure, axes = _sheet(
        len(panels), f"{title} against cost, with the spread over seeds: lower left is better"
    )
    for panel, (name, points) in zip(axes, panels):
        for number, (cost, loss) in points.items():
            deviation = quality(variants[number]).deviation
            error = None if math.isnan(deviation) else deviation
            panel.errorbar(
                cost,
                loss,
                yerr=error,
                linestyle="",
                markersize=7,
                capsize=3,
                label=caption(variants[number].name),
                **_style(number),
            )
        coordinates = list(points.values())
        best = [coordinates[index] for index in frontier(coordinates)]
        costs = [cost for cost, _ in best]
        losses = [loss for _, loss in best]
        panel.plot(costs, losses, color=GREY, linestyle="--", linewidth=1, zorder=0)
        panel.set_xlabel(name)
        panel.set_ylabel("nats per token")
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))
        panel.margins(0.12)
    _legend(figure, axes[0])
    return figure


def _all_held_out(variants: Sequence[Variant]) -> bool:
    """Reports that every run that trained was evaluated as well."""
    for variant in variants:
        for run in variant.counted:
            if run.curve and math.isnan(run.held_out):
                return False
    return True


def _points(
    variants: Sequence[Variant], cost: Callable[[RunRecord], float]
) -> dict[int, tuple[float, float]]:
    """Returns (cost, loss) by the number of the variant, where both are known."""
    points = {}
    for number, variant in enumerate(variants):
        point = (variant.spread(cost).mean, quality(variant).mean)
        if not any(math.isnan(value) for value in point):
            points[number] = point
    return points


def _by_position(variants: Sequence[Variant]) -> Figure | None:
    """Draws mean held-out loss at each distance into a document."""
    losses_by_variant = [by_position(variant) for variant in variants]
    if not any(losses_by_variant):
        return None
    figure, [axes] = _sheet(
        1, "held-out loss by position in the document (nats per token)", width=8
    )
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
            **_style(number),
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("position (tokens, ranges twice as long each)")
    _legend(figure, axes)
    return figure


def _evaluations(variants: Sequence[Variant]) -> Figure | None:
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
    figure, axes = _sheet(len(names), "evaluations while training")
    for panel, name in zip(axes, names):
        values = []
        for number, variant in enumerate(variants):
            curves = [run.grades[name] for run in variant.counted if run.grades.get(name)]
            for curve in curves:
                values += [value for _, value in curve]
            _band(panel, curves, caption(variant.name), _style(number))
        _label_panel(panel, caption(name))
        # Accuracies share one scale, so that panels can be compared.
        if min(values) >= 0 and max(values) <= 1:
            panel.set_ylim(-0.03, 1.03)
    fullest = max(axes, key=lambda panel: len(panel.get_lines()))
    _legend(figure, fullest)
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
