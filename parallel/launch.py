"""Start the ranks of a run on this machine, and tell each rank who it is. The only reader of the environment.

The ranks are started by torchrun's own elastic agent, from the process that checked the config. What a rank has to say
at its end (a fault, a bug, or that a signal stopped it after saving) comes back as one `parallel.outcome.Outcome`.
"""

import json
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from parallel.nodes import Nodes, alone
from parallel.outcome import SAVED, Outcome, of_failure, of_signal, of_success

OUTCOME = "LONGSPAN_OUTCOME"


@dataclass(frozen=True)
class Ranks:
    """Who this process is among all ranks; backend is what carries tensors of `device`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str


def within_torchrun() -> bool:
    """Whether this process is already a rank that somebody's torchrun started."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def place() -> tuple[int, int]:
    """(rank, size) as torchrun says, before any process group exists; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def attempt() -> tuple[int, int]:
    """(how often the ranks were started again already, how often they may be)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


def machine() -> tuple[int, int]:
    """(cores this process may use, GPUs it sees)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores, torch.cuda.device_count()


def start(
    command: Sequence[str],
    *,
    ranks: int,
    scratch: Path,
    max_restarts: int = 0,
    grace_s: int = 60,
    nodes: Nodes | None = None,
) -> Outcome:
    """Run `python command` in `ranks` processes and wait for their end.

    Args:
        command: arguments of the interpreter, the same for all ranks.
        ranks: processes on this machine.
        scratch: a folder for error files; emptied first, removed at the end.
        max_restarts: how often all ranks are started again after one died.
        grace_s: time the ranks have to save after SIGTERM, before SIGKILL. They get SIGTERM when this process is asked to
            stop by SIGTERM, SIGINT or SIGHUP; a second SIGINT ends them at once.
        nodes: the machines, where this is one of several that do the same.
    """
    nodes = nodes or alone(f"longspan-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    told = scratch / "outcome"
    _prepare(ranks, told, near=nodes.near)
    config = LaunchConfig(
        **nodes.meeting(),
        nproc_per_node=ranks,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch)),
        signals_to_handle="SIGQUIT",  # the others are heard by `_listening`
        shutdown_timeout=grace_s,
    )
    heard: list[signal.Signals] = []
    with _listening(heard):
        try:
            elastic_launch(config, sys.executable)(*command)
            return of_success(told)
        except ChildFailedError as error:
            return of_failure(error.failures, ranks * nodes.many)
        except SignalException:
            return of_signal(told, heard[0])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _listening(heard: list[signal.Signals]) -> Iterator[None]:
    """Turn the signals that mean 'stop' into the agent's own exception; the ranks get SIGTERM for each of them.

    The agent's handlers would end it at a second signal, while the ranks save. Here only a second SIGINT does.
    """

    def hear(number: int, frame: Any) -> None:
        again = bool(heard)
        heard.append(signal.Signals(number))
        if not again:
            raise SignalException(f"got {heard[0].name}", sigval=signal.SIGTERM)
        if number == signal.SIGINT and heard.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, hear) for number in SAVED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(ranks: int, told: Path, near: bool) -> None:
    """Set what the ranks inherit; what the user set stays. near: all ranks are on this machine."""
    usual = {
        **({} if machine()[1] else {"DS_ACCELERATOR": "cpu"}),  # else DeepSpeed says of every rank how it found that out
        "OMP_NUM_THREADS": str(max(1, machine()[0] // ranks)),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else keys of a dead attempt meet the next one (gloo cannot restart)
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **({"GLOO_SOCKET_IFNAME": "lo"} if near and sys.platform == "linux" and not machine()[1] else {}),
    }
    for key, value in usual.items():
        os.environ.setdefault(key, value)
    os.environ[OUTCOME] = str(told)
    # the agent describes every failure at length; `Outcome.message` says it once
    for name in [*logging.root.manager.loggerDict, "torch.distributed.elastic"]:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def confess(error: BaseException, fault: int | None, *, again: bool = False) -> None:
    """In a rank: leave word of what ended it, for the launcher to show.

    fault: the exit status when `error` is a message to the user; None when it is a bug and needs its traceback.
    again: whether starting again may mend the fault.
    """
    text = str(error) if fault is not None else "".join(traceback.format_exception(error))
    extra: dict[str, Any] = {"timestamp": str(int(time.time())), "py_callstack": text, "text": text}
    if fault is not None:
        extra["fault"] = fault
        if not again:
            _tell(fault, text)
    # a broken connection is most often the echo of another rank's end
    extra["echo"] = isinstance(error, dist.DistError | ConnectionError) or "onnection" in str(error)
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
        Path(path).write_text(json.dumps({"message": message}))


def leave(code: int, message: str = "") -> int:
    """In a rank that ends in order: tell the launcher the exit status of the run; returns what this rank exits with.

    Under our own launcher a rank that was stopped by a signal exits with 0, or the agent would take it for dead and start
    it again; under somebody else's torchrun it exits with `code`.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first of every machine: each has a launcher
        _tell(code, message)
    return 0 if OUTCOME in os.environ else code


def _tell(code: int, message: str) -> None:
    if path := os.environ.get(OUTCOME):
        whole = Path(f"{path}.{os.getpid()}")
        whole.write_text(json.dumps([code, message]))
        whole.replace(path)


def word_left() -> bool:
    """In a rank: whether an earlier attempt of this run came to an end that starting again would not mend."""
    path = os.environ.get(OUTCOME)
    return path is not None and Path(path).is_file()


def initialise(timeout_s: float = 600, store: Any = None) -> Ranks:
    """Choose the device, join the process group of all ranks, and say who we are.

    Where there are GPUs each rank takes the one of its local number: NCCL carries its tensors and gloo those on the CPU.
    """
    rank, size = place()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    carrier = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(carrier, store=store or meet(), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
    return Ranks(rank, size, local_rank, local_size, device, "nccl" if cuda else "gloo")


def meet() -> Any:
    """The store that the ranks meet at.

    Where the agent lends its own, the keys of every attempt are kept apart (else gloo cannot start again). Our launcher
    lends none: machines that came back count attempts from 0, and would wait for the others under another name.
    """
    rank, size = place()
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(host, port, size, is_master=rank == 0 and not lent)  # pyright: ignore[reportPrivateImportUsage]
    if not lent:
        return store
    return dist.PrefixStore(f"attempt_{attempt()[0]}", store)  # pyright: ignore[reportPrivateImportUsage]
