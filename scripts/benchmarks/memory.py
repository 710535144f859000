"""Measures Transformer-XL's memory: a step with four times as much against the same step.

A layer reads row after row of one long document, forward and backward, with as many recalled tokens
as a row has and with four times as many. Beside them the attention of the difference is measured
alone: keys and values projected, queries that see all of them, and back. Measured in turn in one
process, medians; by cpu is the same by processor time.

Letters: T tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.attention.full import Attention
from models.block import Block, block
from models.carried_state import CarriedState, name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.masks.algebra import Mask
from models.memory.segments import SegmentMemory
from models.positions.base import Position
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.primitives.softmax import Softmax
from models.span import Span
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.malloc import keep_heap
from scripts.benchmarks.timing import BenchmarkEntry, StepCall, alternate, middle

# the larger memory in rows; rows that are read before the clock starts, so that memories are full
TIMES = 4
ROWS = 5
POSITIONS: dict[str, type[Position]] = {"rope": Rope, "relative": Relative}


@dataclass(frozen=True)
class MemorySizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 1024
    heads: int = 8
    width: int = 64
    ranks: int = 1
    threads: int = 1
    repeats: int = 7
    seed: int = 0
    device: str = "cpu"


def parse(words: list[str]) -> MemorySizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also where more ranks are asked for than one: this is about one device.
    """
    found = parse_into(MemorySizes(), words)
    if found.ranks > 1:
        raise ValueError(f"ranks={found.ranks}: the memory is measured on one device; use ranks=1")
    return found


class MemoryBenchmark:
    """Builds what is measured, when it is run."""

    def __init__(self, sizes: MemorySizes):
        self.sizes = sizes
        self.wide = sizes.heads * sizes.width
        keep_heap()

    def noise(self, tokens: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.sizes.seed)
        return torch.randn(1, tokens, self.wide, generator=generator).to(self.sizes.device)

    def layer(self, position: str, length: int) -> tuple[Block, CarriedState]:
        """A layer that recalls so many tokens, and a full memory of them."""
        heads = self.sizes.heads
        mixer = SegmentMemory(length).around(
            Attention(self.wide, heads, heads, POSITIONS[position]())
        )
        made = block(self.wide, mixer, SwiGLU(self.wide, 4 * self.wide))
        initialise(made, self.sizes.seed).to(self.sizes.device)
        name_stateful_modules(made)
        return made, CarriedState()

    def reading(self, position: str, length: int) -> tuple[StepCall, CarriedState]:
        """Reads the next row of one document, forward and backward; and what is kept between
        rows."""
        made, past = self.layer(position, length)
        x = self.noise(self.sizes.tokens).requires_grad_()
        weight = self.noise(self.sizes.tokens)
        row = 0

        def step() -> None:
            nonlocal row
            span = Span.line(1, self.sizes.tokens, self.sizes.device)
            span = past.attach(span.with_pos(span.pos + row * self.sizes.tokens))
            x.grad = None
            made.zero_grad()
            made(x, span).backward(weight)
            past.advance()
            row += 1

        for _ in range(ROWS):
            step()
        return step, past

    def added(self, position: str) -> StepCall:
        """The attention that the larger memory adds to a row: T queries see (TIMES - 1) T more
        keys, all of them."""
        made, _ = self.layer(position, 1)
        mixer: Any = made.mixer
        more = (TIMES - 1) * self.sizes.tokens
        tokens = self.sizes.tokens
        span = Span.line(1, tokens, self.sizes.device)
        kv_span = Span.line(1, more, self.sizes.device)
        span = span.with_pos(span.pos + more)
        leaf = Softmax(Mask(), mixer.mix.score)
        kept = self.noise(more)
        q = self.noise(tokens).unflatten(-1, (self.sizes.heads, -1)).requires_grad_()
        weight = self.noise(tokens).unflatten(-1, (self.sizes.heads, -1))

        def step() -> None:
            q.grad = None
            made.zero_grad()
            params = mixer.tables() if mixer.tables is not None else ()
            leaf(
                (q,),
                mixer.payload(made.mixer_norm(kept), kv_span),
                params,
                span=span,
                kv_span=kv_span,
            ).backward(weight)

        step()
        return step


def measure(sizes: MemorySizes, group: Any) -> Iterator[dict]:
    """A row of figures for each position scheme; `group` is of this one rank."""
    assert dist.get_world_size(group) == 1
    bench = MemoryBenchmark(sizes)
    for position in POSITIONS:
        few = bench.reading(position, sizes.tokens)
        more = bench.reading(position, TIMES * sizes.tokens)
        steps = {"few": few[0], "more": more[0], "added": bench.added(position)}
        entries = [BenchmarkEntry(name, {}, step) for name, step in steps.items()]
        runs = [middle(each) for each in alternate(entries, sizes.repeats, sizes.threads)]
        found = {
            "position": position,
            "tokens": sizes.tokens,
            "times": TIMES,
            "bytes": more[1].bytes(),
        }
        for name, taken in zip(steps, runs):
            found |= {
                f"{name}_seconds": taken.seconds,
                f"{name}_processor_seconds": taken.processor_seconds,
            }
        yield found | {
            "ratio": _ratio(found, "seconds"),
            "ratio_by_cpu": _ratio(found, "processor_seconds"),
        }


def _ratio(row: dict, what: str) -> float:
    """Returns the added time of a step in units of the attention that it adds."""
    return (row[f"more_{what}"] - row[f"few_{what}"]) / row[f"added_{what}"]


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = (
        "position",
        "row",
        "memory = row",
        f"{TIMES} rows",
        "attention of it",
        "added / that",
        "by cpu",
    )
    lines = [
        "a layer's step, forward and backward, ms; about 1 is asked",
        "".join(f"{name:>16}" for name in columns),
    ]
    for row in rows:
        times = [f"{1e3 * row[f'{name}_seconds']:.0f}" for name in ("few", "more", "added")]
        cells = (
            row["position"],
            row["tokens"],
            *times,
            f"{row['ratio']:.2f}",
            f"{row['ratio_by_cpu']:.2f}",
        )
        lines.append("".join(f"{cell:>16}" for cell in cells))
    carried = {row["position"]: row["bytes"] for row in rows}
    return "\n".join(
        [*lines, f"bytes that a lane carries for a layer, {TIMES} rows recalled: {carried}"]
    )
