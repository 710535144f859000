"""Tables in markdown."""

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Returns cells as a table; the first row is the head.

    Pipes are escaped and line breaks removed, because they would end a cell or a row.
    """
    head, *body = [_escaped(row) for row in rows]
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *body])


def _escaped(row: Sequence[str]) -> list[str]:
    return [" ".join(cell.replace("|", "\\|").split()) for cell in row]
