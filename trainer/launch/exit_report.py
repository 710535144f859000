"""Report on the end of a launch: the first cause, not its echoes in the other ranks."""

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
# Exit statuses as trainer/errors.py has them: settings that cannot be honoured, and the network.
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
    """The exit status of a run, and a message, which is empty when all went well."""

    code: int
    message: str = ""


@contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], object]
) -> Iterator[None]:
    """Gives signals to a handler for a while; signals inherited as ignored stay ignored.

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
    """Returns the report that rank 0 left at an orderly end; None where it left none."""
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
    """Returns the report of a launch whose ranks all ended with 0."""
    return read_report(path) or ExitReport(0)


def report_signal(path: Path, number: signal.Signals) -> ExitReport:
    """Returns the report of a launch that a signal stopped.

    Args:
        path: the file that rank 0 leaves.
        number: the signal that the launcher got; the ranks may have got another.
    """
    left = read_report(path)
    if left is None:
        return ExitReport(
            FAILED, f"{NO_TIME[number]} by {number.name} before there was anything to save"
        )
    return ExitReport(SAVED[number], left.message) if left.code in SAVED.values() else left


def of_no_meeting(error: Exception) -> ExitReport:
    """Returns the report of machines that did not meet, or were parted."""
    return ExitReport(NOT_MET, str(error))


def report_crash(failures: dict[int, ProcessFailure], ranks: int) -> ExitReport:
    """Returns the report of a launch in which ranks failed.

    The cause is a UserError if there is one, else a death by signal, else the first traceback that
    is no echo of a lost connection.
    """
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
    """Returns the record that a rank wrote with `trainer.launch.elastic.report_failure`."""
    message = (
        failure.error_file_data.get("message")
        if isinstance(failure.error_file_data, dict)
        else None
    )
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}
