"""How a launch ended, in one message: the first cause, not its echoes in the other ranks."""

import json
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FAILED = 1
LONGEST = 1 << 20  # bytes of what rank 0 leaves
# Exit statuses as trainer/config/schema.py has them: a wish that cannot be honoured, and what the
# network did.
REFUSED = 2
NOT_MET = 3
SAVED = {  # exit status: stopped by it, state saved
    signal.SIGTERM: 143,
    signal.SIGINT: 130,
    signal.SIGHUP: 129,
    signal.SIGQUIT: 131,
}
NO_TIME = {
    signal.SIGTERM: "stopped",
    signal.SIGINT: "interrupted",
    signal.SIGHUP: "hung up",
    signal.SIGQUIT: "stopped",
}


@dataclass(frozen=True)
class ExitReport:
    """The exit status of a run, and what to tell the user (nothing when all went well)."""

    code: int
    message: str = ""


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Give signals to a handler for a while; those that this process inherited as ignored stay
    ignored.

    `nohup` ignores SIGHUP for what it starts, and a shell ignores SIGINT and SIGQUIT for what it
    starts in the background.
    """
    before = {}
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def read_report(path: Path) -> ExitReport | None:
    """What rank 0 left at an orderly end; None when no rank came to one."""
    if not path.is_file():
        return None
    try:
        with open(path, "rb") as file:
            code, message = json.loads(file.read(LONGEST))
        if type(code) is not int or not isinstance(message, str):
            raise ValueError("no exit status and message")
    except (
        OSError,
        ValueError,
        TypeError,
        RecursionError,
    ) as error:  # a full disk cuts it, for example
        return ExitReport(
            FAILED, f"rank 0 came to an end, but what it left in {path} cannot be read ({error})"
        )
    return ExitReport(code, message)


def report_success(path: Path) -> ExitReport:
    """All ranks ended with 0."""
    return read_report(path) or ExitReport(0)


def report_signal(path: Path, number: signal.Signals) -> ExitReport:
    """The launcher was asked to stop by a signal, and stopped the ranks by one of its own
    choice."""
    left = read_report(path)
    if left is None:
        return ExitReport(
            FAILED, f"{NO_TIME[number]} by {number.name} before there was anything to save"
        )
    return ExitReport(SAVED[number], left.message) if left.code in SAVED.values() else left


def of_no_meeting(error: Exception) -> ExitReport:
    """The machines did not meet, or were parted."""
    return ExitReport(NOT_MET, str(error))


def report_crash(failures: dict[int, ProcessFailure], ranks: int) -> ExitReport:
    """A fault if there is one, else a death by signal, else the first traceback that is no echo of
    a lost connection."""
    found = sorted(failures.items(), key=lambda item: item[1].timestamp)
    words = {rank: _word(failure) for rank, failure in found}
    for rank, _ in found:
        if "fault" in words[rank]:
            return ExitReport(words[rank]["fault"], words[rank]["text"])
    for rank, failure in found:
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            name = signal.Signals(-failure.exitcode).name
            hint = "; the machine may be out of memory" if name == "SIGKILL" else ""
            return ExitReport(FAILED, f"rank {rank} of {ranks} was killed by {name}{hint}")
    for rank, _ in sorted(found, key=lambda item: words[item[0]].get("echo", False)):
        if "text" in words[rank]:
            return ExitReport(
                FAILED, f"rank {rank} of {ranks} failed:\n{words[rank]['text'].rstrip()}"
            )
    rank, failure = found[0]
    return ExitReport(FAILED, f"rank {rank} of {ranks} ended with exit status {failure.exitcode}")


def _word(failure: ProcessFailure) -> dict[str, Any]:
    """What a rank wrote with `trainer.launch.elastic.report_failure`."""
    message = (
        failure.error_file_data.get("message")
        if isinstance(failure.error_file_data, dict)
        else None
    )
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}
