"""Writes the page of a report: one HTML file with its plots inside, without network or script."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from trainer.files.safe_files import make_inside, replace_inside
from trainer.logs.console import count
from trainer.reports.comparison import baseline_part, settings_part
from trainer.reports.evaluation_plots import draw_evaluations
from trainer.reports.markdown import markdown
from trainer.reports.plots import by_position, draw, figures
from trainer.reports.runs import RunRecord, collect
from trainer.reports.sheet import NARROW, png
from trainer.reports.tables import UNKNOWN_CELL, WIDEST, PageRow, table, tables
from trainer.reports.variants import Spread, Variant, variants

PLACE = "report"
PAGE = "index.html"
TABLE = "variants.md"
STYLE = """
body {
  font: 15px/1.5 system-ui, sans-serif; color: #1a202c;
  max-width: 1280px; margin: 2rem auto; padding: 0 1rem;
}
h1, h2 { font-weight: 600; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
th:first-child, td:first-child {
  position: sticky; left: 0; background: #fff; max-width: 45vw;
}
table {
  border-collapse: collapse; font: 13px/1.4 system-ui, sans-serif;
  font-variant-numeric: tabular-nums;
}
td { white-space: nowrap; }
th, td {
  padding: .3rem .45rem; border-bottom: 1px solid #e2e8f0;
  text-align: right; vertical-align: top;
}
th { color: #4a5568; font-weight: 600; border-bottom: 2px solid #cbd5e0; }
td.words, th.words {
  text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem;
}
tr.bad td, tr.bad td:first-child { background: #fff5f5; }
code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
p.small { color: #4a5568; font-size: 13px; }
.wide img { max-width: none; min-width: 40rem; width: 100%; }
@media (max-width: 760px) {
  body { margin: 1rem auto; padding: 0 .6rem; }
  picture img { width: 100%; }
}
"""
TITLES = {
    "curves": "Learning curves",
    "pareto": "Loss against cost",
    "by_position": "Held-out loss by position",
    "evaluations": "Accuracies and other evaluations",
}
NOTE = (
    "Losses are nats per token, after the last step; \u00b1 is the standard deviation over the"
    " seeds of a row. FLOPs are of training, for one document as long as a row. Tokens/s is the"
    " middle step's. Memory is that of the fullest rank. Bytes sent are those of the rank that"
    " sends most, in one step, to share sequences and experts (gradients are not among them). - is"
    " not known."
)
Column = tuple[str, Callable[[Variant], str]]


def write(directory: Path, baseline: str | None = None) -> Path:
    """Writes the report of a run or a sweep into its report/, with the variants as markdown.

    Args:
        directory: of the run or the sweep.
        baseline: name of the variant, or of a run of it, that all others are compared with.

    Returns:
        The path of the page.

    Raises:
        UserError: the directory holds no run, or no such baseline.
        OSError: the report cannot be written.
    """
    runs = collect(directory)
    rows = variants(runs)
    compared = baseline_part(rows, baseline)
    folder = directory / PLACE
    make_inside(directory, PLACE)
    plots = draw(rows, folder)
    title = directory.resolve().name
    head = ["variant"]
    for name, _ in _columns(rows):
        head.append(name)
    head.append("state")
    page_rows = _variant_rows(rows)
    in_markdown = markdown([head, *(cells for _, cells in page_rows)])
    replace_inside(directory, f"{PLACE}/{TABLE}", in_markdown + "\n")
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_summary(runs)}</p>",
        *settings_part(rows),
        "<h2>Variants</h2>",
        *tables(head, page_rows),
        f'<p class="small">{escape(NOTE)}</p>',
        *compared,
    ]
    narrow = figures(rows, NARROW)
    for name, path in plots.items():
        parts.append(f"<h2>{TITLES[name]}</h2>")
        parts.append(_picture(TITLES[name], path.read_bytes(), narrow[name]))
        if name == "by_position":
            parts.append(_position_table(rows))
    for name, path in draw_evaluations(rows, folder).items():
        parts.append(f"<h2>{escape(name)}</h2>")
        parts.append(f'<div class="wide">{_picture(name, path.read_bytes(), None)}</div>')
    parts.append("<h2>Runs and their commands</h2>")
    parts.append(table(["run", "loss", "held out", "state", "command"], _run_rows(runs)))
    top = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    page = f'<!doctype html>\n<html lang="en"><head>{top}</head><body>\n{body}\n</body></html>\n'
    return replace_inside(directory, f"{PLACE}/{PAGE}", page)


def _picture(name: str, content: bytes, narrow: Figure | None) -> str:
    """Returns a picture, and one with a panel below the other for narrow screens."""
    # Inside the page, so that it can be sent as a single file.
    image = f'<img alt="{escape(name)}" src="{_data(content)}">'
    if narrow is None:
        return image
    source = f'<source media="(max-width: 760px)" srcset="{_data(png(narrow))}">'
    return f"<picture>{source}{image}</picture>"


def _data(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _summary(runs: Sequence[RunRecord]) -> str:
    """Returns the sentence that counts runs and finished runs."""
    finished = sum(run.finished for run in runs)
    unfinished = len(runs) - finished
    noun = "runs" if len(runs) > 1 else "run"
    text = f"{len(runs)} {noun}, {finished} finished"
    if unfinished:
        text += f"; {unfinished} did not get to the end, and say so below"
    return escape(text + ".")


def _columns(rows: Sequence[Variant]) -> list[Column]:
    """Returns the columns of figures; evaluations beside held-out loss where a run has them."""
    evaluations = set()
    for variant in rows:
        for run in variant.runs:
            evaluations.update(run.graded)
    columns: list[Column] = [
        ("parameters", _mean_column(lambda run: run.parameters)),
        ("FLOPs/token", _mean_column(lambda run: run.flops_per_token)),
        ("tokens", _mean_column(lambda run: run.tokens)),
        ("loss", lambda variant: loss(variant.spread(lambda run: run.loss))),
        ("held-out loss", lambda variant: loss(variant.spread(lambda run: run.held_out))),
    ]
    for name in sorted(evaluations):
        columns.append(_evaluation_column(name))
    columns += [
        ("tokens/s", _mean_column(lambda run: run.tokens_per_second, ",.0f")),
        ("peak memory", _mean_column(lambda run: run.peak_bytes / 2**20, ",.0f", " MiB")),
        ("bytes sent/step", _mean_column(lambda run: run.sent_bytes)),
    ]
    return columns


def _mean_column(
    figure: Callable[[RunRecord], float], form: str | None = None, unit: str = ""
) -> Callable[[Variant], str]:
    """Returns the function that formats the mean of a figure."""
    return lambda variant: short(variant.spread(figure).mean, form, unit)


def _evaluation_column(name: str) -> Column:
    # A function of its own: a lambda in a loop would see the last name only.
    def cell(variant: Variant) -> str:
        return loss(variant.spread(lambda run: run.graded.get(name, math.nan)))

    return name, cell


def short(value: float, form: str | None = None, unit: str = "") -> str:
    """Formats a number for a cell, by `form` or like 12.3k."""
    if math.isnan(value):
        return UNKNOWN_CELL
    if form:
        return f"{value:{form}}{unit}"
    return count(value)


def loss(value: Spread) -> str:
    """Formats a mean with its deviation, when there is one."""
    if math.isnan(value.mean):
        return UNKNOWN_CELL
    if math.isnan(value.deviation):
        return f"{value.mean:.4f}"
    return f"{value.mean:.4f} \u00b1 {value.deviation:.4f}"


def _variant_rows(rows: Sequence[Variant]) -> list[PageRow]:
    columns = _columns(rows)
    page_rows = []
    for variant in rows:
        figures = [cell(variant) for _, cell in columns]
        all_finished = all(run.finished for run in variant.runs)
        page_rows.append((all_finished, [variant.name, *figures, variant.state]))
    return page_rows


def _run_rows(runs: Sequence[RunRecord]) -> list[PageRow]:
    page_rows = []
    for run in runs:
        losses = [short(run.loss, ".4f"), short(run.held_out, ".4f")]
        cells = [run.name, *losses, run.state, run.command or UNKNOWN_CELL]
        page_rows.append((run.finished, cells))
    return page_rows


def _position_table(rows: Sequence[Variant]) -> str:
    """Returns the losses by position as numbers, a column for each range of positions."""
    losses_by_variant = []
    ranges = set()
    for variant in rows:
        losses = by_position(variant)
        if losses:
            losses_by_variant.append((variant.name, losses))
            ranges.update(losses)
    ordered = sorted(ranges)
    head = []
    for begin, end in ordered:
        head.append(f"{begin}" if end == begin + 1 else f"{begin}-{end - 1}")
    page_rows: list[PageRow] = []
    if len(ordered) > WIDEST:
        # Transposed, or the table would leave the page.
        for name, position in zip(head, ordered):
            cells = [name]
            for _, losses in losses_by_variant:
                cells.append(short(losses.get(position, math.nan), ".3f"))
            page_rows.append((True, cells))
        names = [name for name, _ in losses_by_variant]
        return "\n".join(tables(["position", *names], page_rows))
    for name, losses in losses_by_variant:
        cells = [name]
        for position in ordered:
            cells.append(short(losses.get(position, math.nan), ".3f"))
        page_rows.append((True, cells))
    return table(["position", *head], page_rows)
