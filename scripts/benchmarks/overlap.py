"""Measures how much of a driver's communication is hidden behind its computation.

The link between ranks is slowed on purpose (scripts/benchmarks/slow_link.py). The bandwidth is
chosen so that all sends of a pass take `percent` of the time that the pass takes by itself. Exposed
is what the slow link adds to a pass; its share is in units of the time of the sends: 0 where all
are hidden, 1 where computing waits for each. Medians of alternated runs, forward and backward.

Sends of a forward pass cannot travel during the backward pass. `least` is what remains, beside the
longer of computing and sending, where each pass takes the longer of its own computing and sending.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from models.attention.full import CAUSAL
from models.primitives.scan import Scan
from models.primitives.softmax import Softmax
from models.span import Span
from parallel.drivers.scan import StatePassing
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_ring import Ring
from parallel.layout import zigzag
from parallel.sharding import shard_span
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.slow_link import SlowCommunicator
from scripts.benchmarks.timing import BenchmarkEntry, gathered, timed

GOAL = 1.15  # of the longer of computing and sending


@dataclass(frozen=True)
class OverlapSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 4096
    heads: int = 8
    width: int = 64
    percent: int = 100
    ranks: int = 2
    threads: int = 1
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"


def parse(words: list[str]) -> OverlapSizes:
    """Reads `key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also for one rank, which sends nothing.
    """
    sizes = parse_into(OverlapSizes(), words)
    if sizes.ranks < 2:
        raise ValueError("ranks=1 sends nothing; use ranks=2 or more")
    return sizes


def measure(sizes: OverlapSizes, group: Any) -> Iterator[dict]:
    """Yields a row of figures for each driver; on every rank, in step."""
    for name in ("ring", "allgather", "scan"):
        communicator = SlowCommunicator(group)
        step = DriverStep(name, sizes, communicator)
        entry = BenchmarkEntry(name, {}, step)
        entry.step()
        communicator.bytes_sent.clear()
        entry.step()
        sent = max(gathered(sum(communicator.bytes_sent.values())))
        alone = median(timed(entry, sizes.threads).seconds for _ in range(sizes.repeats))
        alone = max(gathered(alone))
        computing = []
        slowed = []
        forward_computing = []
        for _ in range(sizes.repeats):
            communicator.seconds_per_byte = 0.0
            computing.append(max(gathered(timed(entry, sizes.threads).seconds)))
            forward_computing.append(max(gathered(step.forward_s)))
            communicator.seconds_per_byte = alone * sizes.percent / 100 / sent
            communicator.sending_s = 0.0
            slowed.append(max(gathered(timed(entry, sizes.threads).seconds)))
        sending = max(gathered(communicator.sending_s))
        seconds = median(slowed)
        compute = median(computing)
        forward = median(forward_computing), max(gathered(step.forward_sending_s))
        backward = compute - forward[0], sending - forward[1]
        yield {
            "name": name,
            "ranks": sizes.ranks,
            "bytes": sent,
            "compute_s": compute,
            "send_s": sending,
            "seconds": seconds,
            "exposed_share": max(0.0, seconds - compute) / sending,
            "beside_longer": seconds / max(compute, sending),
            "least": (max(forward) + max(backward)) / max(compute, sending),
        }


class DriverStep:
    """A forward and backward pass of one driver.

    Attributes:
        forward_s, forward_sending_s: seconds of the last forward pass, and of its sends.
    """

    def __init__(self, name: str, sizes: OverlapSizes, communicator: SlowCommunicator):
        self.communicator = communicator
        self.forward_s = 0.0
        self.forward_sending_s = 0.0
        line = Span.line(1, sizes.tokens)
        here = shard_span(line, [zigzag(sizes.tokens, communicator.size)], communicator.rank)
        generator = torch.Generator().manual_seed(sizes.seed)
        shape = (3, 1, here.shape[1], sizes.heads, sizes.width)
        leaves = torch.randn(shape, generator=generator).mul(sizes.width**-0.5).to(sizes.device)
        self.span = here.map(lambda x: x.to(sizes.device)).with_sharding(here.sharding)
        self.leaves = [leaf.requires_grad_() for leaf in leaves.unbind()]
        self.payload = self.leaves[1:]
        if name == "scan":
            self.driver = StatePassing(Scan(), communicator)
            self.payload.append(torch.full(shape[1:4], -0.05, device=sizes.device))
        else:
            kind = {"ring": Ring, "allgather": AllGather}[name]
            self.driver = kind(Softmax(CAUSAL), communicator)

    def __call__(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        began = time.perf_counter()
        before = self.communicator.sending_s
        output = self.driver(self.leaves[:1], self.payload, span=self.span)
        self.forward_s = time.perf_counter() - began
        self.forward_sending_s = self.communicator.sending_s - before
        output.sum().backward()


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = (
        "sent MB",
        "compute ms",
        "send ms",
        "ms",
        "exposed",
        "beside longer",
        "least",
        "goal",
    )
    lines = [f"{'driver':12}" + "".join(f"{name:>15}" for name in columns)]
    for row in rows:
        cells = [
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['compute_s'] * 1000:.0f}",
            f"{row['send_s'] * 1000:.0f}",
            f"{row['seconds'] * 1000:.0f}",
            f"{row['exposed_share']:.2f}",
            f"{row['beside_longer']:.2f}",
            f"{row['least']:.2f}",
            f"{GOAL}",
        ]
        lines.append(f"{row['name']:12}" + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
