"""The command `python -m scripts.calibrate`: measures what plans take for granted of a machine."""

import multiprocessing
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch.nn import functional as F

from trainer.config.finding import Finding, render
from trainer.errors import BAD_CONFIG, DONE, UserError
from trainer.planning.devices import Device

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
SIDE = {"cpu": 768, "cuda": 8192}  # of a matrix
TOKENS = {"cpu": 4096, "cuda": 16384}
HEADS = 8
HEAD_WIDTH = 64
CACHED = 1 << 20  # bytes that a copy moves within the cache of a core
MOVED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes
SENT = 1 << 24  # bytes
FEWEST = 3  # calls
OTHER_MACHINES = 0.1  # of the link within a machine, where no other machine is at hand


def calibrate_command(words: Sequence[str]) -> int:
    """Measures this machine and writes its table; returns the exit status.

    Args:
        words: out= and seconds=.

    Raises:
        UserError: a word that says nothing, or a file that cannot be written.
    """
    asked = {"out": "machine.yaml", "seconds": "1"}
    for word in words:
        key, _, value = word.partition("=")
        if key not in asked or not value:
            _refuse(key, value, "is no word of this command", "use out=FILE.yaml or seconds=1")
        asked[key] = value
    out = Path(asked["out"])
    if out.suffix != ".yaml":
        _refuse("out", asked["out"], "is no yaml file", "use out=machine.yaml")
    try:
        seconds = float(asked["seconds"])
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 3600:
        _refuse("seconds", asked["seconds"], "must be a number of seconds", "use seconds=1")
    measured = calibrate(seconds)
    try:
        out.write_text(yaml.safe_dump(measured, sort_keys=False))
    except OSError as error:
        _refuse("out", asked["out"], f"it cannot be written ({error.strerror})", "use another file")
    print(out.read_text(), end="")
    print(f"# written to {out}; python -m scripts.plan ... device={out}")
    return DONE


def calibrate(seconds: float) -> dict[str, Any]:
    """Returns the table of this machine, as trainer/planning/devices.yaml has it for others."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    memory = None
    if kind == "cuda":
        memory = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f}GiB"
    link = link_bandwidth(seconds)
    # A copy reads and writes.
    bandwidth = 2 * copy_bandwidth(kind, kind, seconds)
    measured = {
        "kind": kind,
        "memory": memory,
        "flops": {
            "matmul": {name: matmul_rate(kind, dtype, seconds) for name, dtype in DTYPES.items()},
            "attention": {
                name: attention_rate(kind, dtype, seconds) for name, dtype in DTYPES.items()
            },
        },
        "memory_bandwidth": bandwidth,
        **(cache_of_core(bandwidth, seconds) if kind == "cpu" else {}),
        "host": copy_bandwidth(kind, "cpu", seconds),
        "within": link,
        "across": OTHER_MACHINES * link,
        "devices": max(1, torch.cuda.device_count()) if kind == "cuda" else 64,
        "operation_s": operation_seconds(kind, seconds),
        "overlaps": kind == "cuda",
    }
    Device.model_validate(measured)
    return measured


def matmul_rate(kind: str, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of a large product of matrices."""
    side = SIDE[kind]
    a = torch.randn(side, side, device=kind).to(dtype)
    return 2.0 * side**3 / _seconds(lambda: a @ a, kind, seconds)


def attention_rate(kind: str, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of causal attention, forward and backward; half of all pairs count."""
    tokens = TOKENS[kind]
    q, k, v = (
        torch.randn(1, HEADS, tokens, HEAD_WIDTH, device=kind).to(dtype).requires_grad_()
        for _ in range(3)
    )

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    products = 2 + 5
    flops = 2.0 * products * HEADS * HEAD_WIDTH * tokens * tokens / 2
    return flops / _seconds(step, kind, seconds)


def copy_bandwidth(source: str, target: str, seconds: float, size: int | None = None) -> float:
    """Bytes per second that a copy of so many bytes moves; of many, where no number is given."""
    kind = "cuda" if "cuda" in (source, target) else "cpu"
    size = MOVED[kind] if size is None else size
    pinned = kind == "cuda"
    a = torch.zeros(size, dtype=torch.uint8, device=source, pin_memory=pinned and source == "cpu")
    b = torch.zeros(size, dtype=torch.uint8, device=target, pin_memory=pinned and target == "cpu")
    return size / _seconds(lambda: b.copy_(a), kind, seconds)


def cache_of_core(bandwidth: float, seconds: float) -> dict[str, Any]:
    """Returns what an operation may move to stay in the cache, and the bytes/s that it then moves.

    Args:
        bandwidth: of memory, bytes/s.
        seconds: that each size is measured for.
    """
    cached = 2 * copy_bandwidth("cpu", "cpu", seconds, CACHED // 2)
    size = CACHED
    # In the cache is what is moved at more than half of the gain.
    while size < MOVED["cpu"]:
        if 2 * copy_bandwidth("cpu", "cpu", seconds, size) < (bandwidth + cached) / 2:
            break
        size *= 2
    return {"cache": f"{size // 1024}KiB", "cache_bandwidth": max(cached, bandwidth)}


def operation_seconds(kind: str, seconds: float) -> float:
    """Seconds of the shortest operation."""
    a = torch.zeros(1, device=kind)
    many = 100

    def step() -> None:
        for _ in range(many):
            a.add_(1)

    return _seconds(step, kind, seconds) / many


def link_bandwidth(seconds: float) -> float:
    """Bytes per second that a rank sends to another on this machine, by the backend of a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_send, args=(r, port, seconds, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        raise UserError("two ranks on this machine could not send to one another")
    return answers.get()


def _send(rank: int, port: int, seconds: float, answers: Any) -> None:
    torch.set_num_threads(1)
    kind = "cuda" if torch.cuda.device_count() > 1 else "cpu"
    backend = "nccl" if kind == "cuda" else "gloo"
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=2)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    tensor = torch.zeros(SENT, dtype=torch.uint8, device=device)
    calls = max(FEWEST, int(10 * seconds))
    times = []
    for _ in range(calls):
        dist.barrier()
        begin = time.perf_counter()
        if rank == 0:
            dist.send(tensor, 1)
        else:
            dist.recv(tensor, 0)
        dist.barrier()
        times.append(time.perf_counter() - begin)
    if rank == 0:
        answers.put(SENT / median(times))
    dist.destroy_process_group()


def _seconds(call: Callable[[], Any], kind: str, seconds: float) -> float:
    """Median seconds of a call, of as many as fit into so many seconds, FEWEST at least."""
    call()
    times: list[float] = []
    while len(times) < FEWEST or sum(times) < seconds:
        _wait(kind)
        begin = time.perf_counter()
        call()
        _wait(kind)
        times.append(time.perf_counter() - begin)
    return median(times)


def _wait(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def _refuse(key: str, value: str, fact: str, remedy: str) -> None:
    raise UserError(render(Finding(key, value, fact, remedy)), BAD_CONFIG)
