"""Starts the ranks of a run on this machine, and gives each rank its place among them.

Only this module and trainer/launch/starters.py read environment variables of launchers.

The ranks are started by torchrun's own elastic agent, from the process that checked the config.
The end of a rank (an error, a bug, or a signal after which it saved) comes back as one
`trainer.launch.exit_report.ExitReport`.
"""

import json
import logging
import os
import platform
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import elastic_launch

from trainer.launch.agent_grace import agent_config
from trainer.launch.exit_report import (
    REFUSED,
    SAVED,
    ExitReport,
    handling,
    of_no_meeting,
    report_crash,
    report_signal,
    report_success,
)
from trainer.launch.nodes import (
    LOOPBACK,
    Nodes,
    NoMeeting,
    interface_of,
    listener,
    loopback,
    resolved,
    single_machine,
)
from trainer.launch.rendezvous import BACKEND, ROUND, Rendezvous, store_of
from trainer.launch.signed_objects import sign_objects
from trainer.launch.starters import Start, started

OUTCOME = "LONGSPAN_OUTCOME"
SECRET = "LONGSPAN_SECRET"  # by which ranks know what comes from a rank
HEARD = (  # beside the outcome: the number of the signal that the launcher was asked to stop by
    ".heard"
)


@dataclass(frozen=True)
class RankInfo:
    """Place of this process among all ranks; the backend carries tensors of `device`."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    backend: str


def rank_and_size() -> tuple[int, int]:
    """Returns (rank, size) as torchrun sets them, before any process group; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def restart_count() -> tuple[int, int]:
    """Returns how often the ranks were started again, and how often they may be."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), int(
        os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)
    )


def machine_limits() -> tuple[int, int]:
    """Returns the number of cores that this process may use, and of the GPUs that it sees."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores, torch.cuda.device_count()


def start_ranks(
    command: Sequence[str],
    *,
    ranks: int,
    scratch: Path,
    max_restarts: int = 0,
    grace_s: int = 60,
    nodes: Nodes | None = None,
    say: Callable[[str], None] = print,
) -> ExitReport:
    """Runs `python command` in `ranks` processes and waits for their end.

    Args:
        command: arguments of the interpreter, the same for all ranks.
        ranks: processes on this machine.
        scratch: a folder for error files; emptied first, removed at the end.
        max_restarts: how often all ranks are started again after one died.
        grace_s: time the ranks have to save after SIGTERM, before SIGKILL. They get SIGTERM when
            this process is asked to stop by SIGTERM, SIGINT or SIGHUP; a second SIGINT ends them at
            once.
        nodes: the machines, where this is one of several that do the same.
        say: takes a line about the other machines.
    """
    nodes = nodes or single_machine(f"longspan-{os.getpid()}")
    outer = started()
    if nodes.many == 1 and outer is not None and outer.size > 1:
        return _refuse_outer(outer)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    told = scratch / "outcome"
    try:
        _prepare(ranks, told, nodes)
    except NoMeeting as error:
        return of_no_meeting(error)
    agent = agent_config(
        grace_s,
        min_nodes=nodes.many,
        max_nodes=nodes.many,
        run_id=nodes.name,
        rdzv_backend=BACKEND,
        rdzv_configs={"meeting": Rendezvous(nodes, say)},
        nproc_per_node=ranks,
        max_restarts=max_restarts,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(scratch)),
        signals_to_handle="",  # `_listening` hears all of them
    )
    heard: list[signal.Signals] = []
    with agent as config, _listening(heard, Path(f"{told}{HEARD}")):
        try:
            elastic_launch(config, sys.executable)(*command)
            return report_success(told)
        except ChildFailedError as error:
            return report_crash(error.failures, ranks * nodes.many)
        except NoMeeting as error:
            return of_no_meeting(error)
        except SignalException:
            return report_signal(told, heard[0])
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _refuse_outer(outer: Start) -> ExitReport:
    """Refuses a start by another launcher: each of its processes would do the whole run."""
    return ExitReport(
        REFUSED,
        f"{outer.starter} started {outer.size} processes, and this command starts its own;"
        " start one",
    )


@contextmanager
def _listening(heard: list[signal.Signals], note: Path) -> Iterator[None]:
    """Turns the signals that mean 'stop' into the agent's exception; ranks then get SIGTERM.

    The agent's handlers would end it at a second signal, while the ranks save. Here only a second
    SIGINT does.

    Args:
        heard: is filled with the signals.
        note: where the ranks read which one was the first.
    """
    # ranks inherit what is ignored: where that is SIGTERM they get the signal that came, which is
    # not
    deaf = signal.getsignal(signal.SIGTERM) is signal.SIG_IGN

    def hear(number: int, frame: Any) -> None:
        again = bool(heard)
        heard.append(signal.Signals(number))
        if not again:
            with suppress(OSError):  # a full disk: the ranks name the signal that they got
                note.write_text(str(number))
            raise SignalException(
                f"got {heard[0].name}", sigval=heard[0] if deaf else signal.SIGTERM
            )
        if number == signal.SIGINT and heard.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt

    with handling(SAVED, hear):
        yield


def _prepare(ranks: int, told: Path, nodes: Nodes) -> None:
    """Sets the environment that the ranks inherit; variables that the user set stay.

    Sockets that other machines could reach are the exception, where the run has one machine.
    """
    bind_transport(nodes.own_address(), only=nodes.address is not None)
    usual = {
        **(
            {} if machine_limits()[1] else {"DS_ACCELERATOR": "cpu"}
        ),  # else DeepSpeed says of every rank how it found that out
        "OMP_NUM_THREADS": str(max(1, machine_limits()[0] // ranks)),
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for key, value in usual.items():
        os.environ.setdefault(key, value)
    os.environ[OUTCOME] = str(told)
    os.environ[SECRET] = nodes.secret  # other users cannot read the environment of our processes
    # the agent describes every failure at length; `Outcome.message` says it once
    for name in [*logging.root.manager.loggerDict, "torch.distributed.elastic"]:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def report_failure(error: BaseException, fault: int | None, *, again: bool = False) -> None:
    """Records in a rank the error that ends it, for the launcher to show.

    Args:
        error: the error.
        fault: the exit status when `error` is a message to the user; None when it is a bug and
            needs its traceback.
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


def report_exit(code: int, message: str = "") -> int:
    """Records the exit status of the run at an orderly end; returns the status of this rank.

    Under our own launcher a rank that was stopped by a signal exits with 0, or the agent would take
    it for dead and start it again; under somebody else's torchrun it exits with `code`.
    """
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the first of every machine: each has a launcher
        _tell(code, message)
    return 0 if OUTCOME in os.environ else code


def _tell(code: int, message: str) -> None:
    if path := os.environ.get(OUTCOME):
        whole = Path(f"{path}.{os.getpid()}")
        whole.write_text(json.dumps([code, message]))
        whole.replace(path)


def asked_by(number: int) -> int:
    """Returns the signal that the launcher got, for a rank that got signal `number` from it.

    It is `number` itself where the launcher left no note.
    """
    if OUTCOME not in os.environ:  # somebody else's launcher
        return number
    try:
        return int(Path(f"{os.environ[OUTCOME]}{HEARD}").read_text())
    except (OSError, ValueError):
        return number


def already_finished() -> bool:
    """Tells in a rank whether an earlier attempt ended in a way that a restart would not mend."""
    path = os.environ.get(OUTCOME)
    return path is not None and Path(path).is_file()


def bind_transport(address: str, only: bool = False) -> None:
    """Limits the transport of tensors to the network of an address.

    On one machine that is the loopback interface, whatever the user's environment says for runs
    over several; there the environment of the user counts first.

    Args:
        address: of this machine, as the other ranks reach it.
        only: whether NCCL's sockets stay on that network as well; by itself NCCL takes every fast
            network.
    """
    interface = interface_of(address)
    if interface is None:
        wish = (
            "no loopback interface"
            if loopback(address)
            else "no network interface with that address"
        )
        raise NoMeeting(
            f"launch.address={address}: this machine has {wish}; give an address that it has"
        )
    if loopback(address):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
        os.environ["NCCL_SOCKET_IFNAME"] = f"={interface}"
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    if only:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


def init_process_group(timeout_s: float = 600, store: Any = None) -> RankInfo:
    """Chooses the device, joins the process group, and returns the place of this rank.

    Where there are GPUs each rank takes the one of its local number: NCCL carries its tensors and
    gloo those on the CPU.
    """
    rank, size = rank_and_size()
    if SECRET in os.environ:
        sign_objects(os.environ[SECRET])
    store = store or rendezvous_store()
    local_rank, local_size = _local_place(store)
    if local_size == size:  # nobody beyond this machine has to reach us
        bind_transport(LOOPBACK)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    carrier = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        carrier, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    return RankInfo(rank, size, local_rank, local_size, device, "nccl" if cuda else "gloo")


def _local_place(store: Any) -> tuple[int, int]:
    """Returns (rank, size) among the ranks of this machine.

    Where no launcher gave them they follow from the names of the machines.
    """
    rank, size = rank_and_size()
    if size == 1:
        return int(os.environ.get("LOCAL_RANK", 0)), 1
    if "LOCAL_RANK" not in os.environ or "LOCAL_WORLD_SIZE" not in os.environ:
        store.set(f"machine_of/{rank}", platform.node())
        names = [bytes(store.get(f"machine_of/{other}")).decode() for other in range(size)]
        os.environ.setdefault("LOCAL_RANK", str(names[:rank].count(names[rank])))
        os.environ["LOCAL_WORLD_SIZE"] = str(Counter(names)[names[rank]])
    return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])


def rendezvous_store() -> Any:
    """Returns the store that the ranks meet at.

    Our launcher lends its own, and the keys of every start of the ranks are kept apart there, as
    gloo cannot start again on old ones; torchrun does the same. Under any other starter the store
    is rank 0's.
    """
    rank, size = rank_and_size()
    if "MASTER_ADDR" not in os.environ:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    host = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    lent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not lent:
        return _own_store(host, port)
    store = dist.TCPStore(host, port, size, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
    if not lent:
        return store
    return dist.PrefixStore(f"ranks_{os.environ.get(ROUND, restart_count()[0])}", store)  # pyright: ignore[reportPrivateImportUsage]


def _own_store(host: str, port: int) -> Any:
    """Opens the store of rank 0, which listens only at the address that the others were given.

    Raises:
        NoMeeting: rank 0 is not on that machine, or other machines could not reach it.
    """
    address = resolved(host)
    if (
        loopback(address)
        and int(os.environ.get("LOCAL_WORLD_SIZE", rank_and_size()[1])) < rank_and_size()[1]
    ):
        raise NoMeeting(
            f"MASTER_ADDR={host} is {address} on the machine of rank 0, which no other machine"
            " reaches; give an address of it"
        )
    try:
        return store_of(listener(address, port), timedelta(seconds=300))
    except OSError as error:
        raise NoMeeting(
            f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 cannot listen there ({error.strerror});"
            " give an address of the machine of rank 0 and a free port"
        ) from error
