"""The page of a report: one HTML file with its pictures inside, that needs no network and no
script."""

import base64
import math
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from trainer.logs.console import count
from trainer.reports.markdown import markdown
from trainer.reports.plots import by_position, draw
from trainer.reports.runs import RunRecord, collect
from trainer.reports.variants import Spread, Variant, variants
from trainer.safe_files import make_inside, replace_inside

WIDEST = 12  # columns of figures that a page of 1,280 has room for
PLACE = "report"
PAGE = "index.html"
TABLE = "variants.md"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a202c; max-width: 1280px; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { font-weight: 600; } h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font: 13px/1.4 system-ui, sans-serif; }
table { font-variant-numeric: tabular-nums; } td { white-space: nowrap; } th { overflow-wrap: anywhere; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid #e2e8f0; text-align: right; vertical-align: top; }
th { color: #4a5568; font-weight: 600; border-bottom: 2px solid #cbd5e0; }
td.words, th.words { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
tr.bad td { background: #fff5f5; } code { font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; } p.small { color: #4a5568; font-size: 13px; }
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


def write(directory: Path) -> Path:
    """Make the report of a run or a sweep in its report/; the page. Beside it the table of variants
    is a file of its own.

    Raises:
        Fault: there is no run.
        OSError: the disk will not have it.
    """
    runs = collect(directory)
    rows = variants(runs)
    place = directory / PLACE
    make_inside(directory, PLACE)
    pictures = draw(rows, place)
    title = directory.resolve().name
    head = ["variant", *(name for name, _ in _columns(rows)), "state"]
    cells = _variant_rows(rows)
    replace_inside(
        directory, f"{PLACE}/{TABLE}", markdown([head, *(each for _, each in cells)]) + "\n"
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{_told(runs)}</p>",
        "<h2>Variants</h2>",
        *_tables(head, cells),
        f'<p class="small">{escape(NOTE)}</p>',
    ]
    for name, path in pictures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        parts += [
            f"<h2>{TITLES[name]}</h2>",
            f'<img alt="{TITLES[name]}" src="data:image/png;base64,{data}">',
        ]
        if name == "by_position":
            parts.append(_positions(rows))
    parts += [
        "<h2>Runs and their commands</h2>",
        _table(["run", "loss", "held out", "state", "command"], _run_rows(runs)),
    ]
    top = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    page = (
        f'<!doctype html>\n<html lang="en"><head>{top}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    return replace_inside(directory, f"{PLACE}/{PAGE}", page)


def _told(runs: Sequence[RunRecord]) -> str:
    done = sum(run.finished for run in runs)
    rest = (
        ""
        if done == len(runs)
        else f"; {len(runs) - done} did not get to the end, and say so below"
    )
    return escape(f"{len(runs)} run{'s' * (len(runs) > 1)}, {done} finished{rest}.")


def _columns(rows: Sequence[Variant]) -> list[Column]:
    """What is said of a variant; evaluations beside held-out loss where any run has them."""
    graded = sorted({name for variant in rows for run in variant.runs for name in run.graded})

    def grade(name: str) -> Column:
        return name, lambda variant: loss(
            variant.spread(lambda run: run.graded.get(name, math.nan))
        )

    return [
        ("parameters", lambda each: short(each.spread(lambda run: run.parameters).mean)),
        ("FLOPs/token", lambda each: short(each.spread(lambda run: run.flops_per_token).mean)),
        ("tokens", lambda each: short(each.spread(lambda run: run.tokens).mean)),
        ("loss", lambda each: loss(each.spread(lambda run: run.loss))),
        ("held-out loss", lambda each: loss(each.spread(lambda run: run.held_out))),
        *map(grade, graded),
        (
            "tokens/s",
            lambda each: short(each.spread(lambda run: run.tokens_per_second).mean, ",.0f"),
        ),
        (
            "peak memory",
            lambda each: short(
                each.spread(lambda run: run.peak_bytes / 2**20).mean, ",.0f", " MiB"
            ),
        ),
        ("bytes sent/step", lambda each: short(each.spread(lambda run: run.sent_bytes).mean)),
    ]


def short(value: float, form: str | None = None, unit: str = "") -> str:
    """A number for a cell."""
    return "-" if math.isnan(value) else f"{value:{form}}{unit}" if form else count(value)


def loss(value: Spread) -> str:
    """A mean with its spread, where there is one."""
    spread = "" if math.isnan(value.deviation) else f" \u00b1 {value.deviation:.4f}"
    return "-" if math.isnan(value.mean) else f"{value.mean:.4f}{spread}"


PageRow = tuple[
    bool, list[str]
]  # whether all of it went well, and the cells, the first of them words


def _variant_rows(rows: Sequence[Variant]) -> list[PageRow]:
    columns = _columns(rows)
    return [
        (
            all(run.finished for run in row.runs),
            [row.name, *(cell(row) for _, cell in columns), row.state],
        )
        for row in rows
    ]


def _run_rows(runs: Sequence[RunRecord]) -> list[PageRow]:
    shown = [(run, short(run.loss, ".4f"), short(run.held_out, ".4f")) for run in runs]
    return [
        (run.finished, [run.name, *values, run.state, run.command or "-"]) for run, *values in shown
    ]


def _positions(rows: Sequence[Variant]) -> str:
    """Loss by position as numbers, a column for each range."""
    told = [(variant, by_position(variant)) for variant in rows]
    ranges = sorted({place for _, found in told for place in found})
    head = [f"{begin}" if end == begin + 1 else f"{begin}-{end - 1}" for begin, end in ranges]
    if len(ranges) > WIDEST:  # then a line for each range, or the table would leave the page
        shown = [(each.name, found) for each, found in told if found]
        lines = [
            (True, [name, *(short(found.get(place, math.nan), ".3f") for _, found in shown)])
            for name, place in zip(head, ranges)
        ]
        return "\n".join(_tables(["position", *(name for name, _ in shown)], lines))
    cells = [
        [each.name, *(short(found.get(place, math.nan), ".3f") for place in ranges)]
        for each, found in told
        if found
    ]
    return _table(["position", *head], [(True, cell) for cell in cells])


def _tables(head: Sequence[str], rows: Sequence[PageRow]) -> list[str]:
    """As few tables as there must be for each to fit a page; the first column is in all of them,
    states in the last."""
    figures = len(head) - 1
    count = max(1, -(-figures // WIDEST))
    share = -(-figures // count)
    tables = []
    for begin in range(1, len(head), share):
        chosen = [0, *range(begin, min(begin + share, len(head)))]
        tables.append(
            _table(
                [head[at] for at in chosen],
                [(well, [cells[at] for at in chosen]) for well, cells in rows],
            )
        )
    return tables


def _table(head: Sequence[str], rows: Sequence[PageRow]) -> str:
    """The first column is words, and so are states; commands are set as code."""
    words = {0} | {at for at, name in enumerate(head) if name in ("state", "command")}

    def cell(tag: str, at: int, text: str) -> str:
        shown = (
            f"<code>{escape(text)}</code>"
            if head[at] == "command" and tag == "td"
            else escape(text)
        )
        kind = f' class="words{" state" * (head[at] == "state")}"' if at in words else ""
        return f"<{tag}{kind}>{shown}</{tag}>"

    lines = ["<tr>" + "".join(cell("th", at, name) for at, name in enumerate(head)) + "</tr>"]
    for well, cells in rows:
        lines.append(f"<tr{'' if well else ' class=' + chr(34) + 'bad' + chr(34)}>")
        lines[-1] += "".join(cell("td", at, text) for at, text in enumerate(cells)) + "</tr>"
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"
