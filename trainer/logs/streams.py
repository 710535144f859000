"""Standard output and error that never end a run, whatever they are, and text that does nothing to
a terminal.

`protect` is called once, where a command begins. What cannot be written is dropped: a run's figures
are on disk as well.
"""

import errno
import io
import os
import select
import sys
import time
import unicodedata
from contextlib import suppress
from typing import Any, TextIO

PIECE = 4096  # bytes; a pipe that has room at all has room for so many (PIPE_BUF)
PATIENCE_S = 10.0  # how long a reader that does not read may hold up a run
JOINERS = (
    "\u200c",
    "\u200d",
)  # invisible, but letters of Persian, of Indian scripts and of emoji hang together by them


class SteadyFile(io.FileIO):
    """A file whose writes never fail; the first failure is told to `told`, and nothing more is
    tried after it.

    A reader that pauses (a pager, a stopped terminal) is waited for once; until it reads again what
    is written is dropped.
    """

    def __init__(self, descriptor: int, told: Any = None, patience_s: float = PATIENCE_S):
        super().__init__(descriptor, "w", closefd=False)
        self.told = told
        self.patience_s = patience_s
        self.gone = False
        self.paused = False

    def write(self, data: Any, /) -> int:
        """Write what can be written; always the whole length, so that nobody above tries again."""
        view = memoryview(data).cast("B")
        begin = 0
        while begin < len(view) and not self.gone:
            try:
                if not self._has_room():
                    break
                begin += super().write(view[begin : begin + PIECE]) or 0
            except OSError as error:
                self._fail(error)
        return len(view)

    def flush(self) -> None:
        """Does nothing: this file holds nothing back."""

    def isatty(self) -> bool:
        """Reports that the stream is a terminal that still exists."""
        try:
            return not self.gone and super().isatty()
        except (OSError, ValueError):
            return False

    def _has_room(self) -> bool:
        """Waits until a piece can be written, at most as long as patience allows."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLOUT)
        end = time.monotonic() + (0.0 if self.paused else self.patience_s)
        while True:
            left = max(0.0, end - time.monotonic())
            if poll.poll(
                left * 1000
            ):  # an error or a hang-up counts as room: the write will say which
                self.paused = False
                return True
            if time.monotonic() >= end:
                self.paused = True
                return False

    def _fail(self, error: OSError) -> None:
        if (
            error.errno == errno.EAGAIN
        ):  # less room than promised: what is left is dropped, like that of a pause
            self.paused = True
            return
        self.gone = True
        if self.told is not None:
            self.told(error)


def protect() -> None:
    """Put streams that cannot fail in the place of standard output and error."""
    _fill_gaps()
    sys.stderr = _steady(sys.stderr, 2, None)
    sys.stdout = _steady(sys.stdout, 1, _tell_of_output)


def plain(text: str) -> str:
    """A text for a screen: what would move its cursor or hide something is shown escaped; new lines
    and tabs stay.

    Texts of a model, of data and of file names may hold anything.
    """
    return "".join(letter if _is_harmless(letter) else _escaped(letter) for letter in text)


def _is_harmless(letter: str) -> bool:
    if letter in "\n\t" or letter in JOINERS:
        return True
    category = unicodedata.category(letter)
    return category[0] != "C" and category not in ("Zl", "Zp")


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


def _fill_gaps() -> None:
    """Open the null device where 0, 1 or 2 are closed, else the next file that is opened gets that
    number.

    Libraries in C would then write their warnings into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
            os.set_inheritable(descriptor, True)


def _steady(stream: TextIO | None, descriptor: int, told: Any) -> TextIO:
    """A text stream over a SteadyFile, of the encoding that `stream` has; letters that it lacks are
    shown escaped."""
    if stream is not None:
        with suppress(OSError, ValueError):
            stream.flush()
    raw = SteadyFile(descriptor, told)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=True,
        write_through=bool(getattr(stream, "write_through", False)),
    )


def _tell_of_output(error: OSError) -> None:
    reason = error.strerror or type(error).__name__
    print(f"standard output takes no more ({reason}); nothing more is shown there", file=sys.stderr)
