"""Compares the variants of a report: settings that differ, and figures less those of a baseline.

A difference from the baseline is taken seed by seed where both variants have runs of the same
seeds: what the seeds have in common cancels out, and the spread is that of the differences.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from typing import Any, NamedTuple

from trainer.config.values import quoted_value
from trainer.errors import UserError
from trainer.reports.runs import RunRecord
from trainer.reports.tables import UNKNOWN_CELL, PageRow, tables
from trainer.reports.variants import Spread, Variant, spread

# What says where and how a run ran, and not what was computed.
APART = ("name", "run_dir", "resume", "seed", "launch", "log", "wandb")
BASELINE_NOTE = (
    "A figure less that of the baseline. Where both have runs of the same seeds the difference is"
    " taken seed by seed, and \u00b1 is its standard deviation over them; else the means are"
    " subtracted and the variances added."
)
FigureOfRun = Callable[[RunRecord], float]


class FigureDifference(NamedTuple):
    """A figure of a variant less that of the baseline.

    Attributes:
        spread: mean and standard deviation.
        pairs: seeds that both have; 0 where the means were subtracted.
    """

    spread: Spread
    pairs: int


def settings_part(rows: Sequence[Variant]) -> list[str]:
    """Returns the part that says in which settings the variants differ; none of a single one."""
    if len(rows) < 2:
        return []
    differing = differing_settings(rows)
    if not differing:
        return []
    page_rows: list[PageRow] = []
    for number, variant in enumerate(rows):
        cells = [variant.name, *(values[number] for values in differing.values())]
        page_rows.append((True, cells))
    return ["<h2>Settings that differ</h2>", *tables(["variant", *differing], page_rows)]


def baseline_part(rows: Sequence[Variant], name: str | None) -> list[str]:
    """Returns the part that compares every variant with a baseline; none without one."""
    if name is None:
        return []
    baseline = find_baseline(rows, name)
    others = [variant for variant in rows if variant is not baseline]
    graded = sorted({grade for variant in rows for run in variant.runs for grade in run.graded})
    figures_of: dict[str, Callable[[RunRecord], float]] = {
        "loss": lambda run: run.loss,
        "held-out loss": lambda run: run.held_out,
    }
    for grade in graded:
        figures_of[grade] = partial(_grade, grade)
    page_rows: list[PageRow] = []
    for variant in others:
        found = [difference(variant, baseline, figure) for figure in figures_of.values()]
        pairs = max(each.pairs for each in found)
        cells = [variant.name, *map(_signed, found)]
        cells.append(_times(ratio(variant, baseline, lambda run: run.tokens_per_second)))
        cells.append(_times(ratio(variant, baseline, lambda run: run.peak_bytes)))
        cells.append(str(pairs) if pairs else "unpaired")
        page_rows.append((all(run.finished for run in variant.runs), cells))
    head = ["variant", *figures_of, "tokens/s", "peak memory", "seeds"]
    return [
        f"<h2>Differences from {escape(baseline.name)}</h2>",
        *tables(head, page_rows),
        f'<p class="small">{escape(BASELINE_NOTE)}</p>',
    ]


def _grade(name: str, run: RunRecord) -> float:
    return run.graded.get(name, math.nan)


def _signed(found: FigureDifference) -> str:
    """Formats a difference with its sign and its deviation over seeds."""
    mean, deviation = found.spread
    if math.isnan(mean):
        return UNKNOWN_CELL
    if math.isnan(deviation):
        return f"{mean:+.4f}"
    return f"{mean:+.4f} \u00b1 {deviation:.4f}"


def _times(value: float) -> str:
    return UNKNOWN_CELL if math.isnan(value) else f"\u00d7 {value:.2f}"


def differing_settings(variants: Sequence[Variant]) -> dict[str, list[str]]:
    """Returns the settings in which the configs of the variants differ, each with a value of each.

    Of a variant the config of its first run that has one counts; a setting that it does not have is
    "-".
    """
    flat: list[dict[str, Any]] = []
    for variant in variants:
        configs = [run.config for run in variant.runs if run.config]
        flat.append(dict(_leaves(configs[0])) if configs else {})
    known = [settings for settings in flat if settings]
    differing: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for settings in known for key in settings):
        values = [_written(settings, key) for settings in flat]
        if len({_written(settings, key) for settings in known}) > 1:
            differing[key] = values
    return differing


def find_baseline(variants: Sequence[Variant], name: str) -> Variant:
    """Returns the variant of a name, or the one that a run of that name belongs to.

    Raises:
        UserError: there is none.
    """
    for variant in variants:
        if name == variant.name or name in [run.name for run in variant.runs]:
            return variant
    known = ", ".join(variant.name for variant in variants)
    raise UserError(f"baseline={name}: there is no such variant; known: {known}")


def difference(variant: Variant, baseline: Variant, figure: FigureOfRun) -> FigureDifference:
    """Returns a figure of a variant less that of the baseline, over the runs that have it."""
    own = _by_seed(variant, figure)
    others = _by_seed(baseline, figure)
    common = [seed for seed in own if seed in others and seed is not None]
    if common:
        return FigureDifference(spread(own[seed] - others[seed] for seed in common), len(common))
    mean, deviation = variant.spread(figure)
    other_mean, other_deviation = baseline.spread(figure)
    # Independent runs: the variances add up.
    return FigureDifference(Spread(mean - other_mean, math.hypot(deviation, other_deviation)), 0)


def ratio(variant: Variant, baseline: Variant, figure: FigureOfRun) -> float:
    """Returns the mean of a figure in units of the baseline's; NaN where one is not known."""
    mean = variant.spread(figure).mean
    other = baseline.spread(figure).mean
    return mean / other if other else math.nan


def _by_seed(variant: Variant, figure: FigureOfRun) -> dict[int | None, float]:
    values = {run.seed: figure(run) for run in variant.counted}
    return {seed: value for seed, value in values.items() if not math.isnan(value)}


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if not prefix and key in APART:
            continue
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _written(settings: Mapping[str, Any], key: str) -> str:
    return quoted_value(settings[key]) if key in settings else "-"
