"""Every mixer under every method it knows, three ranks on one card, against one CPU in float64.

NCCL refuses several ranks on one card, so the ranks' group is gloo's and tensors travel through
the host's memory. A case passes in float32 by a bound, and in bfloat16 where the cut adds little to
what rounding alone does without a cut. JSON lines, and a line of the worst.
"""

import json
import os
import socket
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.support.parity import Case, compare_on, covering
from tests.support.pool import Env

RANKS = 3
FLOAT32 = 2e-4  # of a tensor's largest magnitude; tests of the CPU hold 2e-5
# Half precision: this often the difference without a cut, and so much more.
TIMES, MORE = 3.0, 0.03


def check_drivers(device: str, groups: int, seconds: float) -> bool:
    """Prints a line for each case; tells whether all passed.

    Args:
        device: that all ranks share.
        groups: of three processes, side by side.
        seconds: after which no case is begun; those left out are counted in the last line.
    """
    cases = [case for case in covering() if case.size == RANKS]
    cases += [case._replace(size=RANKS) for case in covering() if case.size != RANKS]
    cases = list(dict.fromkeys(cases))
    context = mp.get_context("spawn")
    found: Any = context.Queue()
    processes = []
    for number in range(groups):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(RANKS):
            args = (rank, port, cases[number::groups], device, seconds, found)
            processes.append(context.Process(target=_serve, args=args, daemon=True))
    for process in processes:
        process.start()
    return _report(cases, found, len(processes))


def _report(cases: list[Case], found: Any, running: int) -> bool:
    worst: dict[Case, dict[str, float]] = {}
    errors: dict[Case, str] = {}
    while running:
        case, value = found.get(timeout=300)
        if case is None:
            running -= 1
        elif isinstance(value, str):
            errors[case] = value
        else:
            here = worst.setdefault(case, value)
            for key in value:
                here[key] = max(here[key], value[key])
    failed = 0
    for case in cases:
        if case in errors:
            failed += 1
            print(json.dumps({"case": str(case), "error": errors[case][-600:]}), flush=True)
        elif case in worst:
            fine = _passes(worst[case])
            failed += not fine
            print(json.dumps({"case": str(case), "passed": fine, **worst[case]}), flush=True)
    tried = len(worst.keys() | errors.keys())
    print(f"drivers: {tried} of {len(cases)} cases tried, {failed} failed", flush=True)
    return failed == 0 and tried == len(cases)


def _passes(worst: dict[str, float]) -> bool:
    half = TIMES * worst["bfloat16 uncut"] + MORE
    return worst["float32"] <= FLOAT32 and worst["bfloat16"] <= half


def _serve(
    rank: int, port: int, cases: list[Case], device: str, seconds: float, found: Any
) -> None:
    began = time.monotonic()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    for case in cases:
        # Rank 0 says when time is over: else some ranks would wait for others.
        over = torch.tensor([time.monotonic() - began > seconds])
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
