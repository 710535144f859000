"""Tables of trials over seeds: the mean of each figure and its range."""

import math
from collections.abc import Callable, Mapping, Sequence

from scripts.experiments.trial import TrialResult
from trainer.reports.markdown import markdown

Figure = Callable[[TrialResult], float | str]  # words must be the same for all seeds


def table(
    learned: Sequence[TrialResult],
    columns: Mapping[str, Figure],
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
    named: dict[str, list[TrialResult]] = {}
    for each in learned:
        named.setdefault(each.name, []).append(each)
    rows = [[head, *columns, "seeds"]]
    for name, every in named.items():
        fine = [each for each in every if each.fault is None]
        failed = f" ({len(every) - len(fine)} failed)" if len(fine) < len(every) else ""
        cells = [_cell([figure(each) for each in fine], digits) for figure in columns.values()]
        rows.append([name, *cells, f"{len(fine)}{failed}"])
    return markdown(rows)


def _cell(found: Sequence[float | str], digits: int) -> str:
    words = [each for each in found if isinstance(each, str)]
    values = [each for each in found if not isinstance(each, str) and not math.isnan(each)]
    if words or not values:
        return words[0] if words else "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    return (
        mean
        if len(values) == 1
        else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"
    )
