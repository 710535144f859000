"""Standard output and error never end a program, whatever they are; texts do nothing to a
terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.logs.console import Console
from trainer.logs.streams import SteadyFile, plain

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import sys
from pathlib import Path
from trainer.logs.console import Console
from trainer.logs.streams import protect
protect()
console = Console(1)
for number in range(3000):
    console.say(f"{number} \\u00fc \\ud800 \\U0001f600")
    print("warning \\u00fc", file=sys.stderr)
open(sys.argv[1], "w").write("to the end")
"""


@pytest.mark.parametrize(
    "shell",
    [
        "| head -1",
        "> /dev/full",
        "> /dev/full 2>&1",
        ">&-",
        ">&- 2>&-",
        "<&- >&- 2>&-",
        "2>&1 | cat",
    ],
    ids=["left", "full", "both full", "closed", "both closed", "all closed", "ascii"],
)
def test_a_program_gets_to_its_end(tmp_path: Path, shell: str) -> None:
    end = tmp_path / "end"
    command = f"{sys.executable} -c '{PROGRAM}' {end} {shell}"
    encoding = {"PYTHONIOENCODING": "ascii"} if "cat" in shell else {}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **encoding}
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        env=environment,
        capture_output=True,
        timeout=60,
    )
    assert done.returncode == 0 and end.read_text() == "to the end"
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr
    if encoding:
        assert b"2999 \\xfc \\ud800 \\U0001f600" in done.stdout
    if shell in ("| head -1", "> /dev/full"):
        assert done.stderr.count(b"standard output takes no more") == 1


def test_a_reader_that_pauses_is_waited_for_once_and_read_on_by_later() -> None:
    reading, writing = os.pipe()
    try:
        file = SteadyFile(writing, patience_s=0.2)
        assert file.write(b"x" * 200_000) == 200_000
        assert file.paused
        taken = os.read(reading, 100_000)
        assert 4096 <= len(taken) < 200_000
        file.write(b"back")
        assert not file.paused
        rest = b""
        while not rest.endswith(b"back"):
            rest += os.read(reading, 100_000)
    finally:
        os.close(reading)
    file.write(b"nobody reads")
    assert file.gone and not file.isatty()
    os.close(writing)


def test_a_terminal_that_went_costs_its_console_and_nothing_else() -> None:
    leader, follower = os.openpty()
    file = io.TextIOWrapper(io.FileIO(follower, "w"), write_through=True)
    console = Console(5, file=file)
    assert console.bar is not None
    os.close(leader)
    console.say("nobody sees this")
    console.close()
    console.finish(Path("/none"))


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_console_survives_any_file(monkeypatch) -> None:
    Console(1, file=Broken()).say("x")
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    Console(1, file=narrow).say("\u4e2d \u00fc")
    assert narrow.buffer.getvalue() == b"\\u4e2d \xfc\n"  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(sys, "stdout", None)
    Console(1).say("x")


def test_what_would_act_on_a_terminal_is_shown_escaped() -> None:
    assert (
        plain("a\x1b[2J\x07\r\x9b\x00\u202e\u2028\ud800")
        == "a\\x1b[2J\\x07\\r\\x9b\\x00\\u202e\\u2028\\ud800"
    )
    kept = "tab\tand\nline, \u00fc \u4e2d \U0001f469\u200d\U0001f52c"
    assert plain(kept) == kept
    file = io.StringIO()
    Console(1, file=file).say("sample: \x1b]0;title\x07")
    assert file.getvalue() == "sample: \\x1b]0;title\\x07\n"
