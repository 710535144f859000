"""Tables of trials over seeds: the mean of each figure and its range."""

import math
from collections.abc import Callable, Mapping, Sequence

from scripts.experiments.trial import TrialResult
from trainer.reports.markdown import markdown

TableColumn = Callable[[TrialResult], float | str]  # words must be the same for all seeds


def table(
    learned: Sequence[TrialResult],
    columns: Mapping[str, TableColumn],
    *,
    head: str = "model",
    digits: int = 3,
) -> str:
    """Returns a markdown table with a row for each name, in the order of the results.

    Args:
        learned: results of any names and seeds; failed ones are counted in the last column.
        columns: title -> figure (or words) of one result; NaN where there is none.
        head: title of the first column.
        digits: behind the decimal point.

    A cell is `mean (least to most)`, or the figure alone of a single seed.
    """
    results_by_name: dict[str, list[TrialResult]] = {}
    for result in learned:
        results_by_name.setdefault(result.name, []).append(result)
    rows = [[head, *columns, "seeds"]]
    for name, results in results_by_name.items():
        succeeded = [result for result in results if result.fault is None]
        failed = len(results) - len(succeeded)
        cells = []
        for figure in columns.values():
            cells.append(_cell([figure(result) for result in succeeded], digits))
        seeds = f"{len(succeeded)} ({failed} failed)" if failed else f"{len(succeeded)}"
        rows.append([name, *cells, seeds])
    return markdown(rows)


def _cell(figures: Sequence[float | str], digits: int) -> str:
    """Formats the figures of all seeds: words as they are, numbers as a mean and a range."""
    values = []
    for figure in figures:
        # Words are the same for all seeds.
        if isinstance(figure, str):
            return figure
        if not math.isnan(figure):
            values.append(figure)
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
