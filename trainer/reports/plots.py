"""The pictures of a report: learning curves, loss against cost, and held-out loss by position."""

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, StrMethodFormatter

from trainer.logs.caption import caption
from trainer.reports.runs import RunRecord
from trainer.reports.variants import Variant, frontier, quality
from trainer.safe_files import replace_inside

GREY = "#4a5568"
PALE = "#e2e8f0"
MARKERS = "osD^vPX*<>"
ACROSS = 3  # panels side by side
# size of its letters; the part of a sheet's width that it may take
LEGEND_POINTS = 9
LEGEND_SHARE = 0.96
LETTER = 0.6  # mean width of a letter, of its size
COSTS: tuple[tuple[str, Callable[[RunRecord], float]], ...] = (
    ("training FLOPs", lambda run: run.flops_per_token * run.tokens),
    ("training seconds x ranks", lambda run: run.seconds * run.ranks),
    ("peak memory of the fullest rank (MiB)", lambda run: run.peak_bytes / 2**20),
)


def draw(variants: Sequence[Variant], directory: Path) -> dict[str, Path]:
    """Make the pictures that the runs allow, as PNG files; {name: path}."""
    figures = {
        "curves": _curves(variants),
        "pareto": _pareto(variants),
        "by_position": _by_position(variants),
        "evaluations": _evaluations(variants),
    }
    paths = {}
    for name, figure in figures.items():
        path = directory / f"{name}.png"
        path.unlink(missing_ok=True)  # of an earlier report
        if figure is not None:
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png")
            paths[name] = replace_inside(
                directory.parent, f"{directory.name}/{path.name}", drawn.getvalue()
            )
    return paths


def _look(number: int) -> dict[str, object]:
    """Colour and marker of a variant, the same in every picture."""
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "color": colours[number % len(colours)],
        "marker": MARKERS[number // len(colours) % len(MARKERS)],
    }


def _sheet(panels: int, title: str, width: float = 5.4) -> tuple[Figure, list[Axes]]:
    columns = min(panels, ACROSS)
    rows = -(-panels // columns)
    figure = Figure(figsize=(width * columns, 4.8 * rows), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=GREY)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for each in axes[panels:]:
        each.set_axis_off()
    del axes[panels:]
    for ax in axes:
        ax.grid(color=PALE, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=GREY)
    return figure, axes


def _legend(figure: Figure, axes: Axes) -> None:
    """What is what, below the panels: as many columns as fit, long names in several lines, and a
    sheet that grows."""
    handles, labels = axes.get_legend_handles_labels()
    if not handles:
        return
    room = figure.bbox.width * LEGEND_SHARE
    letters = (
        int(room / (LEGEND_POINTS * LETTER * figure.dpi / 72)) - 8
    )  # beside the line that a name stands for
    labels = [textwrap.fill(label, max(letters, 16)) for label in labels]
    renderer = FigureCanvasAgg(figure).get_renderer()
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
    """Training loss, a mean over neighbouring rows and over seeds, and held-out loss; all seeds lie
    in the shade."""
    drawn = [variant for variant in variants if any(run.curve for run in variant.runs)]
    if not drawn:
        return None
    checked = any(run.checks for variant in drawn for run in variant.runs)
    figure, axes = _sheet(1 + checked, "loss while training (nats per token)")
    for number, variant in enumerate(variants):
        look = _look(number)
        smooth = [_smoothed(run.curve) for run in variant.counted if run.curve]
        _band(axes[0], smooth, caption(variant.name), {**look, "marker": ""})
        if checked:
            _band(
                axes[1],
                [run.checks for run in variant.counted if run.checks],
                caption(variant.name),
                look,
            )
    for each, name in zip(axes, ("training, smoothed", "held out")):
        each.set_title(name, fontsize=10, color=GREY)
        each.set_xlabel("tokens trained on")
        each.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(figure, axes[0])
    return figure


def _smoothed(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over as many neighbours on either side, so that a slope is not shifted."""
    reach = len(curve) // 30
    last = len(curve) - 1
    spans = [min(reach, at, last - at) for at in range(len(curve))]
    return [
        (curve[at][0], fmean(y for _, y in curve[at - near : at + near + 1]))
        for at, near in enumerate(spans)
    ]


def _band(axes: Axes, curves: Sequence[list[tuple[float, float]]], name: str, look: dict) -> None:
    """The mean of curves as far as all of them go, and between the lowest and the highest a
    shade."""
    points = list(zip(*curves))  # seeds of one variant have their rows at the same steps
    if not points:
        return
    x = [fmean(each[0] for each in at) for at in points]
    y = [[each[1] for each in at] for at in points]
    axes.plot(x, [fmean(each) for each in y], label=name, linewidth=1.6, markersize=5, **look)
    if len(curves) > 1:
        axes.fill_between(
            x,
            [min(each) for each in y],
            [max(each) for each in y],
            color=look["color"],
            alpha=0.15,
            lw=0,
        )


def _pareto(variants: Sequence[Variant]) -> Figure | None:
    """Loss against each cost that is known; the dashed line joins what no other beats in both."""
    panels = [(name, cost) for name, cost in COSTS if _placed(variants, cost)]
    if not panels:
        return None
    held_out = all(
        not math.isnan(run.held_out) for variant in variants for run in variant.counted if run.curve
    )
    what = "held-out loss" if held_out else "loss (held-out where it is known)"
    figure, axes = _sheet(
        len(panels), f"{what} against cost, with the spread over seeds: lower left is better"
    )
    for each, (name, cost) in zip(axes, panels):
        placed = _placed(variants, cost)
        for number, (x, y) in placed.items():
            spread = quality(variants[number]).deviation
            error = None if math.isnan(spread) else spread
            look = _look(number)
            each.errorbar(
                x,
                y,
                yerr=error,
                linestyle="",
                markersize=7,
                capsize=3,
                label=caption(variants[number].name),
                **look,
            )  # pyright: ignore
        best = [list(placed.values())[at] for at in frontier(list(placed.values()))]
        each.plot(
            [x for x, _ in best],
            [y for _, y in best],
            color=GREY,
            linestyle="--",
            linewidth=1,
            zorder=0,
        )
        each.set_xlabel(name)
        each.set_ylabel("nats per token")
        each.xaxis.set_major_formatter(EngFormatter(sep=""))
        each.margins(0.12)
    _legend(figure, axes[0])
    return figure


def _placed(
    variants: Sequence[Variant], cost: Callable[[RunRecord], float]
) -> dict[int, tuple[float, float]]:
    """By variant: (cost, loss), where both are known."""
    points = {at: (each.spread(cost).mean, quality(each).mean) for at, each in enumerate(variants)}
    return {at: point for at, point in points.items() if not any(map(math.isnan, point))}


def _by_position(variants: Sequence[Variant]) -> Figure | None:
    """Mean held-out loss at each distance into a document."""
    if not any(run.by_position for variant in variants for run in variant.counted):
        return None
    figure, [axes] = _sheet(
        1, "held-out loss by position in the document (nats per token)", width=8
    )
    for number, variant in enumerate(variants):
        told = by_position(variant)
        if not told:
            continue
        middles = [((begin + 1) * end) ** 0.5 for begin, end in told]
        axes.plot(
            middles,
            list(told.values()),
            label=caption(variant.name),
            linewidth=1.6,
            markersize=4,
            **_look(number),
        )  # pyright: ignore
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("position (tokens, ranges twice as long each)")
    _legend(figure, axes)
    return figure


def _evaluations(variants: Sequence[Variant]) -> Figure | None:
    """Accuracies and other evaluations while training, a panel each; those with one value have no
    curve."""
    found: dict[str, None] = {}
    for variant in variants:
        for run in variant.counted:
            found |= {name: None for name, points in run.grades.items() if len(points) > 1}
    if not found:
        return None
    figure, axes = _sheet(len(found), "evaluations while training")
    for each, name in zip(axes, found):
        values = []
        for number, variant in enumerate(variants):
            curves = [run.grades[name] for run in variant.counted if run.grades.get(name)]
            values += [value for curve in curves for _, value in curve]
            _band(each, curves, caption(variant.name), _look(number))
        each.set_title(caption(name), fontsize=10, color=GREY)
        each.set_xlabel("tokens trained on")
        each.xaxis.set_major_formatter(EngFormatter(sep=""))
        if min(values) >= 0 and max(values) <= 1:  # shares
            each.set_ylim(-0.03, 1.03)
    _legend(figure, max(axes, key=lambda one: len(one.get_lines())))
    return figure


def by_position(variant: Variant) -> dict[tuple[int, int], float]:
    """Means over the runs that count, by (begin, end)."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in variant.counted:
        for place, loss in run.by_position.items():
            found.setdefault(place, []).append(loss)
    return {place: fmean(found[place]) for place in sorted(found)}
