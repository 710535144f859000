"""Forked ranks that are used again, so that a case does not import torch anew.

The process that forks computes no gradient and has no process group: a fork copies neither the
threads of autograd nor those of a communication backend, and would hang at the first use of them.
"""

import multiprocessing as mp
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from trainer.launch.parent_death import die_with_parent

# Process groups leave threads that keep polling, so a crew is replaced after this many jobs.
JOBS = 25
OUTPUT_CHARACTERS = 600  # of the last words of a rank that died


class Answer(NamedTuple):
    """Result of a job.

    Attributes:
        values: of every rank, in rank order; empty after a failure.
        trace: of the first rank that failed.
        late: no answer came in time.
    """

    values: list[Any]
    trace: str = ""
    late: bool = False


class Crew:
    """`size` forked ranks that wait for work.

    Args:
        size: number of ranks.
        folder: receives their output and the file through which they meet.
    """

    def __init__(self, size: int, folder: Path):
        self.size = size
        self.jobs = 0
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        context = mp.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            parent_end, child_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self.folder, os.getpid(), child_end), daemon=True
            )
            process.start()
            # Else the end of a rank that dies would stay open here, and its death unnoticed.
            child_end.close()
            self.pipes.append(parent_end)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], arguments: Sequence[Any], seconds: float) -> Answer:
        """Calls work(rank, *arguments) on every rank.

        A crew whose answer has no values must be closed: its ranks may wait for one another.
        """
        self.jobs += 1
        for pipe in self.pipes:
            pipe.send((work, tuple(arguments)))
        values: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(values) < self.size:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in values]
            ready = wait(waiting, deadline - time.monotonic())
            if not ready:
                return Answer([], f"no answer in {seconds:g} s", late=True)
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    succeeded, value = self.pipes[rank].recv()
                except EOFError:
                    return Answer([], f"rank {rank} died: {self._last_output(rank)}")
                if not succeeded:
                    return Answer([], value)
                values[rank] = value
        return Answer([values[rank] for rank in range(self.size)])

    def _last_output(self, rank: int) -> str:
        text = (self.folder / f"{rank}.txt").read_text("utf-8", "replace")
        return " ".join(text.split())[-OUTPUT_CHARACTERS:]

    def close(self) -> None:
        """Kills the ranks."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            pipe.close()


class Crews:
    """Crews by size, made when first used, and replaced after a failure or JOBS jobs.

    Args:
        folder: receives the output of the ranks.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.crews: dict[int, Crew] = {}

    def run(
        self, size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 60.0
    ) -> Answer:
        """Calls work(rank, *arguments) on `size` ranks."""
        if size not in self.crews:
            self.crews[size] = Crew(size, self.folder)
        crew = self.crews[size]
        answer = crew.run(work, arguments, seconds)
        if not answer.values or crew.jobs >= JOBS:
            self.crews.pop(size).close()
        return answer

    def close(self) -> None:
        """Kills the ranks of every crew."""
        for crew in self.crews.values():
            crew.close()
        self.crews.clear()


def run_in_lanes(
    lanes: int, work: Callable[..., None], session: Any, cases: Sequence[Any]
) -> Iterator[Any]:
    """Forks `lanes` processes that call work(take, send, session, cases); yields what they send.

    `take` returns the index of the next case that no lane took, None after the last; `send` passes
    a message to the caller.

    Raises:
        RuntimeError: a lane failed or died.
    """
    context = mp.get_context("fork")
    next_index = context.Value("i", 0)

    def take() -> int | None:
        with next_index.get_lock():
            index = next_index.value
            if index >= len(cases):
                return None
            next_index.value += 1
            return index

    def run_lane(pipe: Connection, parent: int) -> None:
        die_with_parent(parent)
        try:
            work(take, pipe.send, session, cases)
        except BaseException:
            # An exception object may not survive pickling; its text does.
            pipe.send(RuntimeError(traceback.format_exc()))
        pipe.close()

    pipes: list[Connection] = []
    processes = []
    for _ in range(lanes):
        parent_end, child_end = context.Pipe(duplex=False)
        process = context.Process(target=run_lane, args=(child_end, os.getpid()))
        process.start()
        child_end.close()
        processes.append(process)
        pipes.append(parent_end)
    try:
        yield from _messages(pipes)
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a lane ended with exit status {process.exitcode}")
    finally:
        for process in processes:
            process.kill()


def _messages(pipes: list[Connection]) -> Iterator[Any]:
    """Yields messages as they come, until every pipe is closed; raises an error that was sent."""
    while pipes:
        for pipe in wait(pipes):
            try:
                message = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                pipes.remove(pipe)  # type: ignore[arg-type]
                continue
            if isinstance(message, RuntimeError):
                raise message
            yield message


def _serve(rank: int, size: int, folder: Path, parent: int, pipe: Connection) -> None:
    """Answers jobs in a forked rank until the pipe is closed."""
    die_with_parent(parent)
    # The handlers of the parent would run here as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _redirect_output(folder / f"{rank}.txt")
    torch.set_num_threads(1)
    # DeepSpeed reads its place from the environment, whatever the process group says.
    os.environ["RANK"] = str(rank)
    os.environ["LOCAL_RANK"] = str(rank)
    os.environ["WORLD_SIZE"] = str(size)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / "store"), size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, work(rank, *arguments))
        except BaseException:
            # SystemExit too is an answer: a rank that leaves in silence would look like a crash.
            answer = (False, traceback.format_exc())
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        pipe.send(answer)


def _redirect_output(path: Path) -> None:
    """Sends standard output and error to a file, also those of libraries written in C."""
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
