"""Sheets that the plots of a report are drawn on, and the marks of a variant in all of them."""

import io
import textwrap
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GREY = "#4a5568"
PALE = "#e2e8f0"
MARKERS = "osD^vPX*<>"
# Neighbours differ, so that of two curves that are equal both colours are seen.
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 1.5, 2)))
MARKED = 8  # markers on a curve
LEGEND_POINTS = 9  # size of the letters of a legend
TITLE_POINTS = 12  # of a title
LEGEND_SHARE = 0.96  # of a sheet's width that a legend may take
LETTER = 0.6  # mean width of a letter, of its size
Style = dict[str, Any]


class Shape(NamedTuple):
    """Form of a figure of several panels.

    Attributes:
        across: panels side by side, at most.
        width: of a panel, in inches.
        widest: of a panel that stands alone.
    """

    across: int
    width: float
    widest: float


WIDE = Shape(3, 4.6, 8.0)
NARROW = Shape(1, 4.2, 4.2)  # read on a screen of 400 pixels


def png(figure: Figure) -> bytes:
    """Returns a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def style_of(number: int) -> Style:
    """Returns colour, marker and dashes of a variant, the same in every plot."""
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue]
    # The markers move on when the colours begin again, so that a hundred variants differ.
    marker = MARKERS[(number + number // len(colours)) % len(MARKERS)]
    return {
        "color": colours[number % len(colours)],
        "marker": marker,
        "linestyle": DASHES[number % len(DASHES)],
    }


def spaced_markers(points: int, number: int) -> tuple[int, int]:
    """Returns first and distance of the markers of a curve; those of equal curves lie apart."""
    distance = max(1, points // MARKED)
    return number * max(1, distance // 4) % distance, distance


def sheet(panels: int, title: str, shape: Shape) -> tuple[Figure, list[Axes]]:
    """Makes a figure of some panels, the title broken into lines that fit."""
    columns = min(panels, shape.across)
    rows = -(-panels // columns)
    width = shape.width * columns if panels > 1 else shape.widest
    figure = Figure(figsize=(width, 4.2 * rows), dpi=130, layout="constrained")
    letters = int(width * LEGEND_SHARE * 72 / (TITLE_POINTS * LETTER))
    lines = textwrap.fill(title, letters)
    figure.suptitle(lines, x=0.01, ha="left", fontsize=TITLE_POINTS, color=GREY)
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


def legend(figure: Figure, axes: Axes) -> None:
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
        box = figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            frameon=False,
            fontsize=LEGEND_POINTS,
        )
        size = box.get_window_extent(renderer)
        if size.width <= room or columns == 1:
            break
        box.remove()
    figure.set_figheight(figure.get_figheight() + size.height / figure.dpi)
