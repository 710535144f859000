"""Tables of a report in HTML, cut where they would leave the page."""

import re
from collections.abc import Sequence
from html import escape

WIDEST = 12  # columns of figures that fit a page of 1,280 pixels
UNKNOWN_CELL = "-"
JOINTS = re.compile(r"([._/=])(?=\w)")  # in a name, where it may be broken
PageRow = tuple[bool, list[str]]  # all runs finished, and the cells; the first of them is text


def tables(head: Sequence[str], rows: Sequence[PageRow]) -> list[str]:
    """Splits a table into as few as fit the page; each repeats the first column."""
    figures = len(head) - 1
    tables_needed = max(1, -(-figures // WIDEST))
    width = -(-figures // tables_needed)
    parts = []
    for begin in range(1, len(head), width):
        end = min(begin + width, len(head))
        part = []
        for finished, cells in rows:
            part.append((finished, [cells[0], *cells[begin:end]]))
        parts.append(table([head[0], *head[begin:end]], part))
    return parts


def table(head: Sequence[str], rows: Sequence[PageRow]) -> str:
    """Returns an HTML table; the first column and states are text, commands are code."""
    header = "".join(_cell("th", index, name, name) for index, name in enumerate(head))
    lines = [f"<tr>{header}</tr>"]
    for finished, cells in rows:
        opening = "<tr>" if finished else '<tr class="bad">'
        body = ""
        for index, text in enumerate(cells):
            body += _cell("td", index, head[index], text)
        lines.append(f"{opening}{body}</tr>")
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _cell(tag: str, index: int, column: str, text: str) -> str:
    """Returns one cell of a table.

    Args:
        tag: th or td.
        index: of the column.
        column: its name.
        text: not yet escaped.
    """
    content = escape(text)
    if tag == "th":
        # Names are broken between their words and nowhere else: narrow columns would break any.
        content = JOINTS.sub(r"\1<wbr>", content)
    if column == "command" and tag == "td":
        content = f"<code>{content}</code>"
    attributes = ""
    if column == "state":
        attributes = ' class="words state"'
    elif index == 0 or column == "command":
        attributes = ' class="words"'
    return f"<{tag}{attributes}>{content}</{tag}>"
