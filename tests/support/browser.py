"""A page in headless Chromium, which resolves no name and so reaches no network."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--log-level=0",
    "--virtual-time-budget=4000",
)
CONSOLE = re.compile(r"CONSOLE[:(].*?\] \"(.*)\", source", re.DOTALL)


class OpenedPage(NamedTuple):
    """A page after its scripts ran.

    Attributes:
        dom: its elements as text.
        messages: what stood in the console, errors among them.
    """

    dom: str
    messages: list[str]


def opened(page: Path, folder: Path, after: str = "") -> OpenedPage:
    """Opens a page, and runs a script behind those of the page.

    Args:
        page: the file.
        folder: for the browser's profile and a copy of the page.
        after: JavaScript.
    """
    copy = folder / "page.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"<script>{after}</script></body>"))
    assert CHROMIUM is not None
    words = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*words, copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    messages = []
    for line in lines:
        match = CONSOLE.search(line)
        messages.append(match[1] if match else line)
    return OpenedPage(done.stdout, messages)
