"""Every mixer under every method it knows, three ranks on one card, against one CPU in float64.

NCCL refuses several ranks on one card, so the ranks' group is gloo's and tensors travel through
the host's memory. A case passes in float32 by a bound, and in bfloat16 where the cut adds little to
what rounding alone does without a cut. Scans are computed by our own chunks: fla's kernels, which
have a step of their own, would be compiled for minutes for widths that no model has.
"""

import os
import queue
import socket
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.kernels import scan_fla
from tests.support.parity import Case, compare_on, covering
from tests.support.pool import Env

RANKS = 3
FLOAT32 = 2e-4  # of a tensor's largest magnitude; tests of the CPU hold 2e-5
# Half precision: this often the difference without a cut, and so much more.
TIMES, MORE = 3.0, 0.03
GROUPS = 4  # of three processes: the processor is the limit, not the card
MARGIN_S = 4.0  # for the cases that run when time is over


class DriverCheck(NamedTuple):
    """The cases, the device of all ranks, and the groups of ranks side by side."""

    cases: list[Case]
    device: str
    groups: int


def prepare(dry: bool) -> DriverCheck:
    """Returns the cases: first one method of every mixer, then the others.

    Args:
        dry: one case on the CPU.
    """
    cases = [case for case in covering() if case.size == RANKS]
    cases += [case._replace(size=RANKS) for case in covering() if case.size != RANKS]
    cases = list(dict.fromkeys(cases))
    if dry:
        return DriverCheck([case for case in cases if case.name == "gated_delta"][:1], "cpu", 1)
    turns: Counter[str] = Counter()
    turn_of = {}
    for case in cases:
        turn_of[case] = turns[case.name]
        turns[case.name] += 1
    return DriverCheck(sorted(cases, key=lambda case: turn_of[case]), "cuda:0", GROUPS)


def check(prepared: DriverCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each case, and one of all.

    Args:
        prepared: the cases, the device that all ranks share, and the groups of three processes that
            work side by side.
        seconds: after which no case is begun.
    """
    cases, device, groups = prepared
    began = time.monotonic()
    context = mp.get_context("spawn")
    found: Any = context.Queue()
    processes = []
    for number in range(groups):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(RANKS):
            last = time.time() + seconds - MARGIN_S
            args = (rank, port, cases[number::groups], device, last, found)
            processes.append(context.Process(target=_serve, args=args, daemon=True))
    for process in processes:
        process.start()
    tried = Tried()
    for row in _rows(found, len(processes), began + seconds):
        tried.count(row)
        yield row
    yield {"cases": len(cases), **vars(tried), "passed": tried.failed == 0}


@dataclass
class Tried:
    """The number of cases that were tried and that failed, and the worst differences."""

    tried: int = 0
    failed: int = 0
    worst_float32: float = 0.0
    worst_bfloat16: float = 0.0
    worst_bfloat16_uncut: float = 0.0

    def count(self, row: dict[str, Any]) -> None:
        """Adds the row of a case."""
        self.tried += 1
        self.failed += row.get("passed") is not True
        self.worst_float32 = max(self.worst_float32, row.get("float32", 0.0))
        self.worst_bfloat16 = max(self.worst_bfloat16, row.get("bfloat16", 0.0))
        uncut = max(self.worst_bfloat16_uncut, row.get("bfloat16 uncut", 0.0))
        self.worst_bfloat16_uncut = uncut


def _rows(found: Any, running: int, deadline: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each case that all its ranks computed, or that one of them could not."""
    heard: dict[Case, list[dict[str, float]]] = {}
    broken: set[Case] = set()
    while running and (left := deadline - time.monotonic()) > 0:
        try:
            case, value = found.get(timeout=left)
        except queue.Empty:
            return
        if case is None:
            running -= 1
        elif isinstance(value, str):
            if case not in broken:
                yield {"case": str(case), "error": value[-600:], "passed": False}
            broken.add(case)
        else:
            values = heard.setdefault(case, [])
            values.append(value)
            if len(values) == RANKS:
                worst = {key: max(each[key] for each in values) for key in value}
                fine = _passes(worst)
                yield {"case": str(case), "passed": fine, **worst, "detail": fine}


def _passes(worst: dict[str, float]) -> bool:
    half = TIMES * worst["bfloat16 uncut"] + MORE
    return worst["float32"] <= FLOAT32 and worst["bfloat16"] <= half


def _serve(rank: int, port: int, cases: list[Case], device: str, last: float, found: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    scan_fla.select_kernel = lambda query, payload, *, before: None
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for case in cases:
        # Rank 0 says when time is over: else some ranks would wait for others.
        over = torch.tensor([time.time() > last])
        dist.broadcast(over, 0)
        if over:
            break
        try:
            found.put((case, compare_on(Env(rank, RANKS), case, device)))
        except Exception:
            found.put((case, traceback.format_exc()))
            # Other ranks may wait in a collective of this case.
            dist.barrier()
            continue
        dist.barrier()
    found.put((None, None))
    found.close()
    found.join_thread()
    os._exit(0)  # a group whose ranks failed in a collective would wait for its end
