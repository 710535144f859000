"""Tables in markdown stay tables, whatever their cells hold."""

from trainer.reports.markdown import markdown


def test_a_cell_ends_neither_its_cell_nor_its_row():
    told = markdown([["name", "value"], ["a|b", "two\nlines"], ["", "3"]])
    assert told.splitlines() == [
        "| name | value |",
        "| --- | --- |",
        r"| a\|b | two lines |",
        "|  | 3 |",
    ]
