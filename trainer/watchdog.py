"""Watchdog: names the rank that hangs when the others have waited too long.

A rank's note is one page of a file under the run directory, mapped into memory: to write it costs
no call of the system, and it stays when its rank is stopped or killed. A thread of each rank renews
it every second with what the rank's main thread does just then, and a rank that cannot even do that
is one that was stopped, or whose machine is gone.
"""

import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from torch.distributed import ProcessGroup

from parallel import collectives
from parallel.mesh import Mesh
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import json_value

BEAT_S = 1.0
STILL_S = 5.0  # a rank without a beat for this long stands still
PAGE = 4096
CLAIM = "told_"  # prefix of the files by which one rank takes on to tell of something
ROOT = str(Path(__file__).resolve().parent.parent)
OURS = tuple(os.path.join(ROOT, home, "") for home in ("models", "parallel", "trainer"))
# Frames of these files wait for other ranks; a file of ours is named by its module, so that the
# name cannot go stale.
WAITING = (f"{os.sep}torch{os.sep}distributed{os.sep}", str(collectives.__file__))


EnterPhase = Callable[
    [str, int], None
]  # (phase, step): the rank enters it; all ranks enter the same phases in the same order


class Hang(UserError):
    """Ranks waited too long for another; starting again may well mend it."""

    again = True

    def __init__(self, message: str):
        super().__init__(message, BAD_RUN)


class HeartbeatNote(NamedTuple):
    """Position of a rank in the run.

    Attributes:
        passed: number of phases that it has entered.
        step: number of the step.
        phase: name of the phase.
        doing: the line of ours that its main thread is in.
        waits: whether it waits for other ranks.
        beat: time of the note in seconds, as time.time has it.
    """

    passed: int
    step: int
    phase: str
    doing: str
    waits: bool
    beat: float

    def place(self) -> str:
        doing = f" ({self.doing})" if self.doing else ""
        return f"step {self.step}, {self.phase}{doing}"


class Heartbeat:
    """Writes the note of this rank, and renews it from a thread.

    Args:
        folder: made when missing; the same for all ranks.
        rank: this one.
    """

    def __init__(self, folder: Path, rank: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = _path(folder, rank)
        self.path.write_bytes(bytes(PAGE))
        with open(self.path, "r+b") as file:
            self.page = mmap.mmap(file.fileno(), PAGE)
        self.main = threading.get_ident()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.passed = 0
        self.where = (0, "getting ready")
        self._write("", False)
        self.thread = threading.Thread(target=self._beat, name="watch", daemon=True)
        self.thread.start()

    def heartbeat(self, phase: str, step: int) -> None:
        """Notes that this rank enters a phase; see EnterPhase."""
        self.passed = self.passed + 1
        self.where = (step, phase)
        self._write("", False)

    def forget(self) -> None:
        """Removes the note, after an orderly end."""
        self.path.unlink(missing_ok=True)
        with suppress(OSError):  # only the last rank finds the folders empty
            self.path.parent.rmdir()
            self.path.parent.parent.rmdir()

    def close(self) -> None:
        """Ends the thread that renews the note."""
        self.ended.set()
        self.thread.join()

    def _beat(self) -> None:
        while not self.ended.wait(BEAT_S):
            frame = sys._current_frames().get(self.main)
            self._write(*current_call(frame) if frame is not None else ("", False))

    def _write(self, told: str, waits: bool) -> None:
        with self.lock:
            text = json.dumps([self.passed, *self.where, told, waits, time.time()]).encode()[
                : PAGE - 1
            ]
            self.page[: len(text) + 1] = text + b"\0"


@contextmanager
def watching(folder: Path, mesh: Mesh, timeout_s: float) -> Iterator[EnterPhase]:
    """Notes the position of this rank; a timeout becomes a Hang that names the rank behind it.

    Args:
        folder: for the notes of this attempt alone.
        mesh: the ranks.
        timeout_s: the longest wait of a collective.
    """
    if mesh.world.group is None or mesh.world.size == 1:
        yield lambda phase, step: None
        return
    _limit(mesh, timeout_s)
    watch = Heartbeat(folder, mesh.world.rank)
    # Of an earlier start that was killed. Nobody claims anything before a collective timed out.
    for claimed in folder.glob(f"{CLAIM}*"):
        claimed.unlink(missing_ok=True)
    try:
        yield watch.heartbeat
        watch.forget()
    except RuntimeError as error:  # torch's own kinds of it differ from one backend to another
        if "timed out" not in str(error).lower():
            raise
        raise Hang(
            describe_hang(read_heartbeats(folder, mesh.world.size), watch.where, timeout_s)
        ) from error
    finally:
        watch.close()


def _limit(mesh: Mesh, timeout_s: float) -> None:
    """Gives every group of the mesh the timeout; torch gives each new group half an hour."""
    grids = [grid for grid in (mesh.device_mesh, mesh.experts_mesh) if grid is not None]
    limit([*mesh.groups, *(group for grid in grids for group in grid.get_all_groups())], timeout_s)


def limit(groups: Iterable[ProcessGroup | None], timeout_s: float) -> None:
    """Sets the longest wait of the collectives of these groups."""
    for group in {id(group): group for group in groups if group is not None}.values():
        group.set_timeout(timedelta(seconds=timeout_s))


def current_call(frame: FrameType) -> tuple[str, bool]:
    """Returns the innermost line of ours that a thread is in, and whether it waits for ranks."""
    inner = frame
    call = ""
    waits = any(part in frame.f_code.co_filename for part in WAITING)
    while not inner.f_code.co_filename.startswith(OURS):
        if inner.f_code.co_filename.endswith("distributed_c10d.py"):
            call = f"{inner.f_code.co_name} at "
        if inner.f_back is None:
            return call.removesuffix(" at "), waits
        inner = inner.f_back
    return f"{call}{os.path.relpath(inner.f_code.co_filename, ROOT)}:{inner.f_lineno}", waits


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}"


def read_heartbeats(folder: Path, size: int) -> list[HeartbeatNote | None]:
    """Returns the note of every rank; None where it is missing or cannot be read."""
    found: list[HeartbeatNote | None] = []
    for rank in range(size):
        try:
            found.append(
                HeartbeatNote(
                    *json_value(_path(folder, rank).read_bytes().partition(b"\0")[0], "note")
                )
            )
        except (OSError, ValueError, TypeError):
            found.append(None)
    return found


def claim(folder: Path, what: str) -> bool:
    """Takes on to tell of something for all ranks; False where a rank has done so before.

    Args:
        folder: of the notes of this attempt; where it is missing, this rank is alone.
        what: kind of the event.
    """
    try:
        os.close(os.open(folder / f"{CLAIM}{what}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        # A full disk, for example: told twice is better than not told.
        return True
    return True


def is_claimed(folder: Path, what: str) -> bool:
    """Tells whether a rank has claimed to tell of something."""
    return (folder / f"{CLAIM}{what}").exists()


def waits_now(note: HeartbeatNote | None) -> bool:
    """Tells whether a rank is alive and waits for others, so that it will time out as they do."""
    return note is not None and note.waits and abs(time.time() - note.beat) <= STILL_S


def _since(beat: float, now: float) -> str:
    return f"for {now - beat:.0f} s" if beat <= now else "since the machine's clock was set back"


def describe_hang(
    every: Sequence[HeartbeatNote | None],
    here: tuple[int, str],
    timeout_s: float,
    now: float | None = None,
) -> str:
    """Returns the message that names the ranks behind a timeout, and how that shows.

    Args:
        every: notes, by rank. here: (step, phase) of the rank that waited.
        now: seconds, time.time's.
    """
    now = time.time() if now is None else now
    size = len(every)
    there = {rank: note for rank, note in enumerate(every) if note is not None}
    missing = [rank for rank in range(size) if rank not in there]
    still = {rank: note for rank, note in there.items() if abs(now - note.beat) > STILL_S}
    first = max((note.passed for note in there.values()), default=0)
    late = {rank: note for rank, note in there.items() if note.passed < first}
    busy = {rank: note for rank, note in there.items() if not note.waits}
    if missing:
        who = [f"rank {rank} of {size} left no word" for rank in missing]
    elif still:
        who = [
            f"rank {r} of {size} stands still: no sign {_since(n.beat, now)}, in {n.place()}"
            for r, n in still.items()
        ]
    elif late:
        who = [
            f"rank {rank} of {size} did not come: it is in {note.place()}"
            for rank, note in late.items()
        ]
    elif 0 < len(busy) < size:
        who = [
            f"rank {rank} of {size} did not come: it is busy in {note.place()}"
            for rank, note in busy.items()
        ]
    else:
        who = [f"rank {rank} of {size} is in {note.place()}" for rank, note in there.items()]
    return (
        f"the ranks waited longer than launch.timeout_s={timeout_s:g} in step {here[0]}, {here[1]}:"
        f" {'; '.join(who)}; the last checkpoint is intact; give the same command again, with a"
        " larger launch.timeout_s if that rank was only slow"
    )
