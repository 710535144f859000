"""The device of a check, and its clock."""

import time
from collections.abc import Callable
from statistics import median

import torch

HEADS = 16
KEY_HEADS = 4
HEAD_WIDTH = 128
FEWEST = 3  # timed calls


def card(dry: bool) -> torch.device:
    """Returns the device: the first GPU, or the CPU of a rehearsal.

    Raises:
        RuntimeError: there is no GPU, or this torch was built without CUDA.
    """
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("there is no GPU here, or this torch was built without CUDA")
    return torch.device("cuda", 0)


def milliseconds(call: Callable[[], object], device: torch.device, most_s: float = 0.4) -> float:
    """Returns the median time of a call, after one that is not counted.

    Args:
        device: on which it computes; a GPU's own clock is read.
        most_s: after which no further call is begun, once there are FEWEST.
    """
    call()
    _wait(device)
    taken = []
    began = time.monotonic()
    while len(taken) < FEWEST or (time.monotonic() - began < most_s and len(taken) < 20):
        taken.append(_timed(call, device))
    return median(taken)


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start = torch.cuda.Event(enable_timing=True)
    stop = torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
