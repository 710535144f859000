"""Meters of tokens per second, step seconds, peak memory and model FLOPs utilisation.

Seconds are those of training alone: work under `pause` (evaluation, checkpoints, plots) is not
counted. MFU = FLOPs of the step / (step seconds x peak FLOP/s of all devices), after Chowdhery et
al. 2022 (arXiv:2204.02311). Theirs counts every pair of tokens of a row in attention; ours takes
the FLOPs that the caller counted, which are those of visible pairs (causal, within a document:
models/cost/flops.py), 3 x forward, and none for recomputation.
"""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

# dense bfloat16 FLOP/s by a word of the device's name, from the makers' data sheets; the first that
# fits
PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("GH200", 9.89e14),
    ("H200", 9.89e14),
    ("H100 NVL", 8.35e14),
    ("H100 PCIe", 7.56e14),
    ("H100", 9.89e14),
    ("H800", 9.89e14),
    ("H20", 1.48e14),
    ("A100", 3.12e14),
    ("A800", 3.12e14),
    ("L40S", 3.62e14),
    ("L40", 1.81e14),
    ("L4", 1.21e14),
    ("A40", 1.497e14),
    ("A10G", 7.0e13),
    ("A10", 1.25e14),
    ("RTX 4090", 1.652e14),
    ("RTX 3090", 7.1e13),
    ("MI300X", 1.307e15),
    ("MI250X", 1.915e14),  # one of its two dies, which is what torch calls a device
)


class Peak(NamedTuple):
    """The most FLOP/s that one device could do (None = not known), and where the number comes
    from."""

    flops_per_second: float | None
    source: str


class MeterReading(NamedTuple):
    """Figures of the steps since the last reading."""

    tokens_per_second: float
    step_seconds: float
    mfu: float | None


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of a device: of a GPU from the table, of a CPU the best of a few short matmuls in
    `dtype`, made now."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((value for part, value in PEAKS if re.search(rf"\b{part}\b", name)), None)
        return Peak(found, f"dense bfloat16 of {name}" if found else f"no peak known for {name}")
    size = 512
    best = float("inf")
    a = torch.ones(size, size, dtype=dtype)
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - begin)
    name = str(dtype).removeprefix("torch.")
    return Peak(
        2 * size**3 / best,
        f"a {size} x {size} {name} matmul on this CPU, measured now, this rank's threads",
    )


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank ever held: allocated on its GPU, or resident in this process on a
    CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Counts the tokens, FLOPs and training seconds between two readings.

    Args:
        peak: of one device.
        devices: how many share the run.
        clock: seconds.
    """

    def __init__(self, peak: Peak, devices: int, *, clock: Callable[[], float] = time.perf_counter):
        self.peak = peak
        self.devices = devices
        self.clock = clock
        self.tokens = self.flops = self.steps = 0
        self.paused = 0.0
        self.begin = clock()

    def add(self, tokens: int, flops: float) -> None:
        """A step is done: its tokens and its FLOPs over all ranks."""
        self.tokens += tokens
        self.flops += flops
        self.steps += 1

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave what happens inside out of the seconds."""
        begin = self.clock()
        try:
            yield
        finally:
            self.paused += self.clock() - begin

    def read(self, now: float | None = None) -> MeterReading:
        """Means over the steps since the last reading, which begin anew. At least one step must
        have been added.

        Args:
            now: when the last of them was done, by the clock; None = now.
        """
        now = self.clock() if now is None else now
        seconds = max(now - self.begin - self.paused, 1e-9)
        rate = self.peak.flops_per_second
        mfu = None if rate is None else self.flops / (seconds * rate * self.devices)
        reading = MeterReading(self.tokens / seconds, seconds / self.steps, mfu)
        self.tokens = self.flops = self.steps = 0
        self.paused = 0.0
        self.begin = now
        return reading

    def convention(self) -> str:
        """One line for the log: what MFU means here."""
        rate = self.peak.flops_per_second
        if rate is None:
            return f"mfu: not given, {self.peak.source}"
        return (
            f"mfu: FLOPs of visible pairs, 3 x forward / (seconds x {self.devices} x"
            f" {rate / 1e12:.3g} TFLOP/s: {self.peak.source})"
        )
