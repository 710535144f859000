"""Pictures of named evaluations with the variants of a sweep beside each other."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trainer.files.safe_files import replace_inside
from trainer.logs.evaluation_plots import Cells, draw_cells, kind_of
from trainer.reports.variants import Variant


def draw_evaluations(variants: Sequence[Variant], directory: Path) -> dict[str, Path]:
    """Draws the last cells of every named evaluation as PNG files.

    Args:
        variants: of the report; those without cells are left out.
        directory: receives the files.

    Returns:
        The paths by the name of the figure, such as needle/accuracy.
    """
    names: dict[str, None] = {}
    for variant in variants:
        for run in variant.counted:
            names |= dict.fromkeys(run.cells)
    paths = {}
    for name in names:
        shown: list[tuple[str, Cells]] = []
        for variant in variants:
            cells = mean_cells([run.cells[name] for run in variant.counted if name in run.cells])
            if cells:
                shown.append((variant.name, cells))
        if not shown or kind_of(shown[0][1]) is None:
            continue
        # Variants whose evaluation had other settings are drawn as far as they have the same kind.
        kind = kind_of(shown[0][1])
        shown = [(label, cells) for label, cells in shown if kind_of(cells) == kind]
        width = 4.0 * min(len(shown), 4) if kind in ("depths", "heads") else 9.0
        lines = -(-len(shown) // 4) if kind in ("depths", "heads") else 1
        figure = Figure(figsize=(max(width, 6.0), 3.6 * lines + 1), dpi=130, layout="constrained")
        draw_cells(figure, shown, name)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png")
        inside = f"{directory.name}/evaluation_{name.replace('/', '_')}.png"
        paths[name] = replace_inside(directory.parent, inside, drawn.getvalue())
    return paths


def mean_cells(runs: Sequence[Cells]) -> list[dict[str, Any]]:
    """Returns the mean of the cells of several seeds; of other cells than the first's, nothing."""
    if not runs:
        return []
    means = []
    for index, first in enumerate(runs[0]):
        same = [cells[index] for cells in runs if len(cells) == len(runs[0])]
        cell = dict(first)
        for key, value in first.items():
            if isinstance(value, float):
                cell[key] = sum(other.get(key, value) for other in same) / len(same)
        means.append(cell)
    return means
