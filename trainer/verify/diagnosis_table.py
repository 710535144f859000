"""The table of the doctor's findings on the terminal."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from trainer.verify.diagnosis import Diagnosis

COLUMNS = ("check", "what", "figure", "bound", "", "note")


def show(findings: Sequence[Diagnosis], title: str) -> None:
    """Prints the table."""
    table = Table(title=title, title_justify="left")
    for name in COLUMNS:
        is_number = name in ("figure", "bound")
        table.add_column(name, justify="right" if is_number else "left")
    for finding in findings:
        sign = ">" if finding.check == "reach" else "<"
        table.add_row(
            finding.check,
            finding.subject,
            f"{finding.figure:.1e}",
            f"{sign} {finding.bound:.0e}",
            "ok" if finding.passed else "FAULT",
            finding.note,
        )
    # Without a terminal rich assumes 80 columns, and would wrap every line.
    width = None if sys.stdout.isatty() else 132
    Console(width=width).print(table)
