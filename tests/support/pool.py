"""Gloo ranks kept alive between tests, so that a distributed case costs milliseconds and not an
import of torch.

    ranks(3, worker, *args)    runs worker(env, *args) on three processes: results by rank

A worker is a function at the top of a module. A failure in one rank fails the test with that rank's
traceback, and the pool of that size is thrown away, because its ranks may be waiting in a
collective. Groups are made once for the same ranks
and kept: each has threads that never rest, and some hundreds of them leave the machine time for
little else.
"""

import atexit
import os
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed import device_mesh

from trainer.launch.parent_death import die_with_parent

TIMEOUT_S = 120
PRELOADED = [
    "torch.distributed",
    "torch.distributed.elastic.multiprocessing.api",
    "trainer.run",
    "trainer.stages",
    "trainer.preflight.prepare",
    "trainer.launch.elastic",
    "trainer.sweep.sweep",
    "tests.variants",
    "tests.support.forked_python",
    "tests.support.warm",  # the last
]
# Seconds each, of transformers with fla and of deepspeed: where some of the tests have them, a
# rank of each of their pools would import them again.
HEAVY = ["tests.support.hub", "parallel.engines.deepspeed"]


@dataclass
class Env:
    """What a worker is told: its number, how many there are, and the group of exactly these
    ranks."""

    rank: int
    size: int

    @property
    def group(self) -> Any:
        return dist.group.WORLD


def _serve(rank: int, size: int, port: int, parent: int, inbox: Any, outbox: Any) -> None:
    die_with_parent(parent)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size)
    )
    os.environ.update(LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=size)
    asked = _keep_groups()
    while (job := inbox.get()) is not None:
        worker, args = job
        asked.clear()
        try:
            torch.manual_seed(0)
            outbox.put((rank, True, worker(Env(rank, size), *args)))
        except BaseException:  # told to the parent, which fails the test with it
            outbox.put((rank, False, traceback.format_exc()))
    dist.destroy_process_group()


def _keep_groups() -> dict[Any, int]:
    """From now on the groups that a job makes are those that an earlier one made of the same ranks;
    none is closed.

    Returns how many a job has asked for, by ranks; to be cleared before the next. Within a job
    groups stay apart.
    """
    made: dict[Any, Any] = {}
    asked: dict[Any, int] = {}
    make, close = dist.new_group, dist.destroy_process_group

    def kept(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        kwargs.pop("group_desc", None)
        key = (None if ranks is None else tuple(ranks), args, tuple(sorted(kwargs.items())))
        asked[key] = asked.get(key, 0) + 1
        if (key, asked[key]) not in made:
            made[key, asked[key]] = make(ranks, *args, **kwargs)
        return made[key, asked[key]]

    def closed(group: Any = None) -> None:
        if group is None:
            close()

    dist.destroy_process_group = closed
    dist.new_group = device_mesh.new_group = kept
    return asked


def server_context() -> Any:
    """Of multiprocessing: a process forks from a server that has imported everything already.

    From nothing, the ten ranks of four pools would import torch for a minute.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read once, while torch is imported
    context = mp.get_context("forkserver")
    heavy = [name for name in HEAVY if name in sys.modules]
    context.set_forkserver_preload([*PRELOADED[:-1], *heavy, PRELOADED[-1]])
    return context


class Pool:
    """`size` processes waiting for work."""

    def __init__(self, size: int):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = server_context()
        self.inboxes = [context.Queue() for _ in range(size)]
        self.outbox = context.Queue()
        self.processes = [
            context.Process(
                target=_serve,
                args=(r, size, port, os.getpid(), self.inboxes[r], self.outbox),
                daemon=True,
            )
            for r in range(size)
        ]
        for process in self.processes:
            process.start()

    def run(self, worker: Any, args: tuple) -> list:
        """Results in rank order; raises AssertionError with the traceback of the first rank that
        failed."""
        for inbox in self.inboxes:
            inbox.put((worker, args))
        results = {}
        for _ in self.processes:
            rank, fine, value = self.outbox.get(timeout=TIMEOUT_S)
            if not fine:
                raise AssertionError(f"rank {rank} of {len(self.processes)} failed:\n{value}")
            results[rank] = value
        return [results[r] for r in range(len(self.processes))]

    def close(self, politely: bool) -> None:
        for inbox in self.inboxes:
            if politely:
                inbox.put(None)
        for process in self.processes:
            process.join(timeout=5 if politely else 0)
            if process.is_alive():
                process.kill()


POOLS: dict[int, Pool] = {}


def ranks(size: int, worker: Any, *args: Any) -> list:
    """Run `worker(env, *args)` on `size` gloo ranks and return what each gave back."""
    pool = POOLS.get(size) or POOLS.setdefault(size, Pool(size))
    try:
        return pool.run(worker, args)
    except BaseException:
        POOLS.pop(size).close(politely=False)
        raise


@atexit.register
def _close() -> None:
    for pool in POOLS.values():
        pool.close(politely=True)
