"""Pictures of named evaluations, chosen by what their cells hold.

length and depth       a heat map of the accuracy
length                 accuracy over length, or over whatever else varies
begin and end          loss over positions
layer and head         a heat map of the induction score, and its growth over steps
"""

import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.logs.caption import caption
from trainer.logs.jsonl import EVALUATION, read

Cells = Sequence[dict[str, Any]]
GREY = "#4a5568"
PALE = "#e2e8f0"
COLOURS = "viridis"
TITLE = 36  # letters of a panel's title
LINE = 110  # letters of a line of a legend
JUMP = 0.5  # an induction score from which on the heads count as there
NOT_PLACES = ("accuracy", "exact", "loss", "whole", "generated", "examples", "tokens", "pairs")


def evaluation_figures(directory: Path, title: str) -> Iterator[tuple[str, Figure]]:
    """Yields (name of the picture, picture) of every named evaluation of a run with cells.

    Args:
        directory: of the run.
        title: in front of each picture's own.
    """
    by_name: dict[str, list[dict[str, Any]]] = {}
    for row in read(directory / EVALUATION):
        if row.get("part") and row.get("value") is not None:
            by_name.setdefault(row["name"], []).append(row)
    for name, rows in by_name.items():
        cells = rows[-1].get("cells")
        if not cells:
            continue
        figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
        step = rows[-1]["step"]
        shown = f"{title}: {caption(name)} at step {step}"
        if not draw_cells(figure, [("", cells)], shown):
            continue
        yield name.replace("/", "_"), figure
        if kind_of(cells) == "heads":
            part = rows[-1]["part"]
            others = {other: by_name.get(f"{part}/{other}", []) for other in ("accuracy",)}
            curves = {"score": rows, **others}
            yield f"{part}_over_steps", _over_steps(curves, f"{title}: {part} while training")


def kind_of(cells: Cells) -> str | None:
    """Returns which picture fits some cells; None where none does."""
    first = cells[0]
    if "layer" in first and "head" in first and "induction" in first:
        return "heads"
    if "begin" in first and "end" in first and "loss" in first:
        return "positions"
    if "length" in first and "depth" in first and "accuracy" in first:
        return "depths"
    if "accuracy" in first and place_of(cells) is not None:
        return "lines"
    return None


def place_of(cells: Cells) -> str | None:
    """Returns the setting over which cells go; None where none varies."""
    for key in cells[0]:
        if key in NOT_PLACES or key == "task":
            continue
        if isinstance(cells[0][key], int | float):
            return key
    return None


def draw_cells(figure: Figure, variants: Sequence[tuple[str, Cells]], title: str) -> bool:
    """Draws the cells of one evaluation, of one run or of several side by side.

    Args:
        figure: empty.
        variants: (label, cells) of each, the same kind in all.
        title: of the figure.

    Returns:
        Whether a picture fits such cells.
    """
    kind = kind_of(variants[0][1])
    if kind is None:
        return False
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    if kind in ("depths", "heads"):
        _heat_maps(figure, variants, kind)
        return True
    axes = figure.subplots()
    _style(axes)
    for label, cells in variants:
        if kind == "positions":
            _draw_positions(axes, label, cells)
        else:
            _draw_lines(axes, label, cells)
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        # Below the panel, because the settings that name a variant may be long.
        wrapped = [textwrap.fill(label, LINE) for label in labels]
        figure.legend(handles, wrapped, loc="outside lower left", frameon=False, fontsize=8)
    return True


def _heat_maps(figure: Figure, variants: Sequence[tuple[str, Cells]], kind: str) -> None:
    """Draws a panel for each variant, at most four side by side, with one scale for all."""
    columns = min(len(variants), 4)
    lines = -(-len(variants) // columns)
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel in panels[len(variants) :]:
        panel.set_axis_off()
    image = None
    for panel, (label, cells) in zip(panels, variants):
        if kind == "depths":
            table = _grid(cells, "depth", "length", "accuracy")
            panel.set_xlabel("length (tokens)", fontsize=8, color=GREY)
            panel.set_ylabel("depth of the needle", fontsize=8, color=GREY)
        else:
            table = _grid(cells, "layer", "head", "induction")
            panel.set_xlabel("head", fontsize=8, color=GREY)
        values, down, across = table
        image = panel.imshow(values, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        panel.set_xticks(range(len(across)), [caption(str(place)) for place in across], fontsize=7)
        panel.set_yticks(range(len(down)), [caption(str(place)) for place in down], fontsize=7)
        panel.tick_params(colors=GREY)
        if label:
            short = textwrap.shorten(label, TITLE, placeholder=" ...")
            panel.set_title(caption(short), fontsize=9, color=GREY)
        if values.size <= 100:
            _write_values(panel, values)
    assert image is not None, "there is a variant"
    bar = figure.colorbar(image, ax=panels, location="right", aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=GREY)


def _write_values(panel: Axes, values: np.ndarray) -> None:
    """Writes each value into its cell, dark on light and light on dark."""
    for (down, across), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "white" if value < 0.6 else "black"
            panel.text(
                across, down, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour
            )


def _grid(cells: Cells, down: str, across: str, value: str) -> tuple[np.ndarray, list, list]:
    """Returns (values, places down, places across); NaN where there is no cell."""
    rows = list(dict.fromkeys(cell[down] for cell in cells))
    columns = list(dict.fromkeys(cell[across] for cell in cells))
    values = np.full((len(rows), len(columns)), math.nan)
    for cell in cells:
        values[rows.index(cell[down]), columns.index(cell[across])] = cell[value]
    return values, rows, columns


def _style(axes: Axes) -> None:
    axes.grid(color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY)


def _draw_positions(axes: Axes, label: str, cells: Cells) -> None:
    middles = [(cell["begin"] + cell["end"]) / 2 for cell in cells]
    losses = [cell["loss"] for cell in cells]
    axes.plot(middles, losses, marker="o", markersize=3, linewidth=1.5, label=caption(label))
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel("mean loss (nats per token)")


def _draw_lines(axes: Axes, label: str, cells: Cells) -> None:
    """Draws accuracy over what varies, a line for each task."""
    place = place_of(cells)
    assert place is not None, "kind_of says so"
    tasks = list(dict.fromkeys(cell.get("task", "") for cell in cells))
    for task in tasks:
        own = [cell for cell in cells if cell.get("task", "") == task]
        name = " ".join(word for word in (label, task) if word)
        x = [cell[place] for cell in own]
        y = [cell["accuracy"] for cell in own]
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.5, label=caption(name))
    axes.set_xlabel(place)
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)


def _over_steps(curves: dict[str, list[dict[str, Any]]], title: str) -> Figure:
    """Draws figures over steps, with the step at which the first of them jumps."""
    figure = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=GREY)
    axes = figure.subplots()
    _style(axes)
    for name, rows in curves.items():
        steps = [row["step"] for row in rows]
        values = [row["value"] for row in rows]
        axes.plot(steps, values, marker="o", markersize=3, label=caption(name))
    jump = next((row["step"] for row in curves["score"] if row["value"] >= JUMP), None)
    if jump is not None:
        axes.axvline(jump, color=GREY, linewidth=0.8, linestyle="--")
        axes.annotate(f"{JUMP} at step {jump}", (jump, 1.0), fontsize=8, color=GREY)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(-0.03, 1.06)
    axes.legend(frameon=False, fontsize=8)
    return figure
