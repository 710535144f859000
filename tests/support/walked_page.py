"""A page of the docs as a reader follows it: the files that it shows, and its commands in order."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"`([\w/.]+)`:\s*\Z")  # of a file, as the last words before its fence


def walk(page: Path, heading: str, folder: Path, run: Callable[[Sequence[str]], str]) -> list[str]:
    """Writes every file that a section shows and gives every command; returns what each printed.

    Args:
        page: in markdown.
        heading: of the section.
        folder: that is worked in.
        run: gives a command, the folder being the present one.
    """
    text = page.read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert text, f"{page} has no section {heading}"
    printed = []
    for fence in FENCE.finditer(text):
        language, body = fence.groups()
        name = NAME.search(text[: fence.start()])
        if language:
            assert name is not None, f"a file without a name: {body[:60]}"
            path = folder / name[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
            continue
        for line in body.splitlines():
            printed.append(run(shlex.split(line)))
    return printed
