"""A lock between processes, by the system or by a folder where there are no file locks."""

import errno
import fcntl
import logging
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LOG = logging.getLogger("longspan.data")
LACKING = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
    errno.ENOTTY,
}  # what flock says where there are none
BEAT_S = 2.0  # seconds between two signs of life of a holder
STILL_S = 20.0  # a holder without one for as long is dead
LOOK_S = 0.2


def flocked(handle: int, kind: int) -> bool | None:
    """Takes the system's lock without waiting; returns None where the file system has none."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in LACKING:
            return None
        raise
    return True


@contextmanager
def exclusive(path: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds the lock at a path; `waiting` is called once where another process has it."""
    with open(path, "a") as file:
        taken = flocked(file.fileno(), fcntl.LOCK_EX)
        if taken is False:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        if taken is None:
            say_lacking(str(path.parent))
            with held(path.with_name(f"{path.name}.held"), waiting):
                yield
        else:
            yield


@cache
def say_lacking(folder: str) -> None:
    """Warns once in a process that the file system has no locks."""
    LOG.warning(
        "%s has no file locks: a folder stands for each, given up %g s after its holder was killed",
        folder,
        STILL_S,
    )


@contextmanager
def held(
    folder: Path, waiting: Callable[[], None], patience_s: float = float("inf")
) -> Iterator[None]:
    """Holds a lock by a folder that only one process can make and that its holder touches.

    Raises TimeoutError where a living holder has it for longer than `patience_s`.
    """
    _make(folder, waiting, patience_s)
    ended = threading.Event()
    thread = threading.Thread(target=_beat, args=(folder, ended), name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path, waiting: Callable[[], None], patience_s: float) -> None:
    began = time.monotonic()
    sign = None
    seen = began
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            now = time.monotonic()
            latest = _sign(folder)
            if sign is None and latest is not None:
                waiting()
            if latest != sign:
                sign = latest
                seen = now
            # By this machine's own clock: that of a file server may differ, or be set while one
            # waits.
            if _dead(folder) or now - seen > STILL_S:
                _take_away(folder)
            elif now - began > patience_s:
                raise TimeoutError(f"{folder} is held by {_owner(folder)}") from None
            time.sleep(LOOK_S)
        else:
            (folder / "owner").write_text(f"{os.getpid()} on {platform.node()}")
            return


def _beat(folder: Path, ended: threading.Event) -> None:
    count = 0
    while not ended.wait(BEAT_S):
        count += 1
        try:
            (folder / "beat").write_text(str(count))
        except OSError:  # the disk is full, or the folder was taken away: who waits sees no sign
            continue


def _sign(folder: Path) -> str | None:
    try:
        facts = (folder / "beat").read_text() if (folder / "beat").exists() else "0"
        return f"{facts} {folder.stat().st_ino}"
    except OSError:
        return None


def _owner(folder: Path) -> str:
    try:
        return f"process {(folder / 'owner').read_text()}"
    except OSError:
        return "another process"


def _dead(folder: Path) -> bool:
    """Tells whether the holder was a process of this machine that has ended."""
    try:
        process, _, machine = (folder / "owner").read_text().partition(" on ")
        if machine != platform.node():
            return False
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False


def _take_away(folder: Path) -> None:
    """Removes the folder of a dead holder, by a rename that only one process wins."""
    aside = folder.with_name(f"{folder.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        folder.rename(aside)
    except OSError:
        return
    shutil.rmtree(aside, ignore_errors=True)
