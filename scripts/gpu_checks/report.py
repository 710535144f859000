"""The page of a check: a table of the steps, and one of the rows of each, in Markdown."""

from collections.abc import Sequence
from typing import Any

from scripts.gpu_checks.schedule import Step

OWN = ("step", "ready", "ended", "outcome", "seconds")
LONGEST = 160  # letters of a cell


def markdown(rows: Sequence[dict[str, Any]], steps: Sequence[Step]) -> str:
    """Returns the page.

    Args:
        rows: as the steps said them, with the name of each under "step". Those with "detail" are
            left to the lines of JSON.
        steps: in their order.
    """
    lines = ["| step | outcome | ready after, s | took, s | rows | not passed |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    parts = []
    for step in steps:
        own = [row for row in rows if row["step"] == step.name]
        found = [row for row in own if _is_a_finding(row)]
        lines.append(_summary(step, own, found))
        parts += _table(step, [row for row in found if not row.get("detail")])
    return "\n".join([*lines, *parts]) + "\n"


def _is_a_finding(row: dict[str, Any]) -> bool:
    return any(key not in OWN for key in row)


def _summary(step: Step, own: list[dict[str, Any]], found: list[dict[str, Any]]) -> str:
    last: dict[str, Any] = {}
    for row in own:
        last |= row
    failed = sum(row.get("passed") is False or "error" in row for row in found)
    cells = [step.title, last.get("outcome", "not begun"), last.get("ready", "")]
    cells += [last.get("seconds", ""), len(found), failed]
    return _line(cells)


def _table(step: Step, rows: list[dict[str, Any]]) -> list[str]:
    """Returns one table for each set of columns."""
    parts: list[str] = []
    before: list[str] = []
    for row in rows:
        columns = [key for key in row if key not in ("step", "detail")]
        if columns != before:
            if not parts:
                parts += ["", f"**{step.title}**"]
            parts += ["", _line(columns), _line(["---"] * len(columns))]
            before = columns
        parts.append(_line([row[key] for key in columns]))
    return parts


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = " ".join(str(value).split()).replace("|", "\\|")
    return text if len(text) <= LONGEST else "..." + text[-LONGEST:]
