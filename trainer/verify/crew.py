"""Ranks forked from a process that has imported everything, and used again: a case costs no import
of torch.

The process that forks computes no gradient itself and holds no process group, so that what is
forked starts clean.
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

JOBS = 25  # a crew does before it is replaced: each leaves process groups, whose threads never rest


class Answer(NamedTuple):
    """What came of a job: a value of each rank, or a trace of the first that failed; `late` where
    none came in time."""

    values: list[Any]
    trace: str = ""
    late: bool = False


class Crew:
    """`size` ranks that wait for work.

    Args:
        size: how many.
        folder: for what they print and for the file where they meet.
    """

    def __init__(self, size: int, folder: Path):
        self.size = size
        self.jobs = 0
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        context = mp.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, self.folder, os.getpid(), there), daemon=True
            )
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], arguments: Sequence[Any], seconds: float) -> Answer:
        """work(rank, *arguments) on every rank. After an answer without values the crew is of no
        further use."""
        self.jobs += 1
        for pipe in self.pipes:
            pipe.send((work, tuple(arguments)))
        values: dict[int, Any] = {}
        end = time.monotonic() + seconds
        while len(values) < self.size:
            ready = wait(
                [pipe for rank, pipe in enumerate(self.pipes) if rank not in values],
                end - time.monotonic(),
            )
            if not ready:
                return Answer([], f"no answer in {seconds:g} s", late=True)
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    fine, value = self.pipes[rank].recv()
                except EOFError:
                    return Answer([], f"rank {rank} died: {self._said(rank)}")
                if not fine:
                    return Answer([], value)
                values[rank] = value
        return Answer([values[rank] for rank in range(self.size)])

    def _said(self, rank: int) -> str:
        text = (self.folder / f"{rank}.txt").read_text("utf-8", "replace")
        return " ".join(text.split())[-600:]

    def close(self) -> None:
        """End the ranks, whatever they do."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            pipe.close()


class Crews:
    """A crew of every size that was asked for, replaced after a failure and after JOBS jobs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.crews: dict[int, Crew] = {}

    def run(
        self, size: int, work: Callable[..., Any], *arguments: Any, seconds: float = 60.0
    ) -> Answer:
        """work(rank, *arguments) on `size` ranks."""
        crew = self.crews.get(size) or self.crews.setdefault(size, Crew(size, self.folder))
        answer = crew.run(work, arguments, seconds)
        if not answer.values or crew.jobs >= JOBS:
            self.crews.pop(size).close()
        return answer

    def close(self) -> None:
        """End them all."""
        for crew in self.crews.values():
            crew.close()
        self.crews.clear()


def beside(
    lanes: int, work: Callable[..., None], session: Any, cases: Sequence[Any]
) -> Iterator[Any]:
    """What `lanes` forked processes tell, as it comes: each does work(take, tell, session, cases).

    take: the number of the next case that nobody took, None after the last. Raises RuntimeError
    where one dies.
    """
    context = mp.get_context("fork")
    following = context.Value("i", 0)

    def take() -> int | None:
        with following.get_lock():
            following.value += 1
            return following.value - 1 if following.value <= len(cases) else None

    def be(pipe: Connection, parent: int) -> None:
        die_with_parent(parent)
        try:
            work(take, pipe.send, session, cases)
        except BaseException:
            pipe.send(RuntimeError(traceback.format_exc()))
        pipe.close()

    pipes: list[Connection] = []
    processes = []
    for _ in range(lanes):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=be, args=(there, os.getpid())))
        processes[-1].start()
        there.close()
        pipes.append(here)
    try:
        while pipes:
            for pipe in wait(pipes):
                try:
                    told = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    pipes.remove(pipe)  # type: ignore[arg-type]
                    continue
                if isinstance(told, RuntimeError):
                    raise told
                yield told
        for process in processes:
            process.join()
            if process.exitcode:
                raise RuntimeError(f"a lane ended with exit status {process.exitcode}")
    finally:
        for process in processes:
            process.kill()


def _serve(rank: int, size: int, folder: Path, parent: int, pipe: Connection) -> None:
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    output = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    read_by_deepspeed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size}
    os.environ.update(
        {key: str(value) for key, value in read_by_deepspeed.items()}, GLOO_SOCKET_IFNAME="lo"
    )
    store = dist.FileStore(str(folder / "store"), size)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while True:
        try:
            work, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            answer = (True, work(rank, *arguments))
        except BaseException:  # told to the process that forked us
            answer = (False, traceback.format_exc())
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        pipe.send(answer)
