"""Measures attention that computes only chosen pairs beside full attention of the same sizes.

A step is forward and backward of one layer over one row that is one document, on one device: with
its projections, its hashes or its indexer and that one's loss. "beside full" is its time in units
of full attention's, by the clock and by processor time, which a busy machine disturbs less; the
goal is half. "planned" is the same ratio by the cost model of `python -m scripts.plan device=cpu`.
Medians of alternated runs, after one that does not count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.attention.compressed import Compressed
from models.attention.full import MultiHead
from models.attention.lsh import LSHAttention
from models.init import initialise
from models.positions.rope import Rope
from models.span import Span
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.timing import BenchmarkEntry, alternate, middle
from trainer.planning.devices import read_device
from trainer.planning.planned_layer import plan_layer

FULL = "full"
GOAL = 0.5
SHARE = 16  # of the blocks of the row one is chosen


@dataclass(frozen=True)
class SparseSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 16384
    width: int = 512
    heads: int = 8
    hashes: int = 4
    chunk: int = 128
    block: int = 4
    larger_block: int = 16
    window: int = 128
    threads: int = 1
    repeats: int = 3
    seed: int = 0
    ranks: int = 1
    device: str = "cpu"


def parse(words: list[str]) -> SparseSizes:
    """Reads `key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also for more than one rank, or a row of fewer than 16 blocks.
    """
    sizes = parse_into(SparseSizes(), words)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: one device is measured; use ranks=1")
    for name in ("block", "larger_block"):
        block = getattr(sizes, name)
        if sizes.tokens < SHARE * block:
            raise ValueError(
                f"tokens={sizes.tokens} are fewer than {SHARE} blocks of {name}={block}; use"
                f" {SHARE * block} or more"
            )
    return sizes


def layers(sizes: SparseSizes) -> dict[str, Callable[[], nn.Module]]:
    """Returns the builders of the measured layers, by name."""
    width = sizes.width
    heads = sizes.heads

    def compressed(block: int) -> tuple[str, Callable[[], nn.Module]]:
        blocks = sizes.tokens // block
        top = blocks // SHARE
        return f"compressed, {top} of {blocks} blocks of {block}", lambda: Compressed(
            width, heads, Rope(), block=block, top=top, window=sizes.window
        )

    return {
        FULL: lambda: MultiHead(width, heads, Rope()),
        f"lsh, {sizes.hashes} hashes, chunks of {sizes.chunk}": lambda: LSHAttention(
            width,
            heads,
            Rope(),
            layer=0,
            seed=sizes.seed,
            context_length=sizes.tokens,
            chunk_size=sizes.chunk,
            hashes=sizes.hashes,
        ),
        **dict(compressed(block) for block in (sizes.block, sizes.larger_block)),
    }


def measure(sizes: SparseSizes, group: Any) -> Iterator[dict]:
    """Yields a row of figures for each layer; `group` is of this one rank."""
    assert dist.get_world_size(group) == 1
    entries = []
    for name, build in layers(sizes).items():
        entry = BenchmarkEntry(name, {"tokens": sizes.tokens}, _step(sizes, build))
        torch.set_num_threads(sizes.threads)
        entry.step()
        entries.append(entry)
    runs = [middle(each) for each in alternate(entries, sizes.repeats, sizes.threads)]
    planned = {name: _planned(sizes, build) for name, build in layers(sizes).items()}
    for entry, taken in zip(entries, runs, strict=True):
        yield {
            "name": entry.name,
            **entry.facts,
            "seconds": taken.seconds,
            "processor_seconds": taken.processor_seconds,
            "beside_full": taken.seconds / runs[0].seconds,
            "beside_full_by_cpu": taken.processor_seconds / runs[0].processor_seconds,
            "planned_beside_full": planned[entry.name] / planned[FULL],
        }


def _step(sizes: SparseSizes, build: Callable[[], nn.Module]) -> Callable[[], None]:
    layer = initialise(build(), seed=sizes.seed).to(sizes.device)
    generator = torch.Generator().manual_seed(sizes.seed)
    hidden = torch.randn(1, sizes.tokens, sizes.width, generator=generator).to(sizes.device)
    hidden.requires_grad_()
    span = Span.line(1, sizes.tokens, sizes.device)

    def step() -> None:
        layer.zero_grad()
        hidden.grad = None
        _loss(layer, layer(hidden, Span.of(span.pos, span.doc))).backward()

    return step


def _planned(sizes: SparseSizes, build: Callable[[], nn.Module]) -> float:
    shape = 1, sizes.tokens, sizes.width
    return plan_layer(build, shape, read_device("cpu"), loss_of=_loss).seconds


def _loss(layer: nn.Module, output: Tensor) -> Tensor:
    loss = output.sum()
    if isinstance(layer, Compressed):
        loss = loss + layer.auxiliary["indexer"].sum()
    return loss


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("tokens", "ms", "beside full", "by cpu", "planned", "goal")
    lines = [f"{'attention':40}" + "".join(f"{name:>13}" for name in columns)]
    for row in rows:
        cells = [
            f"{row['tokens']:,}",
            f"{row['seconds'] * 1000:.0f}",
            f"{row['beside_full']:.2f}",
            f"{row['beside_full_by_cpu']:.2f}",
            f"{row['planned_beside_full']:.2f}",
            "-" if row["name"] == FULL else f"{GOAL}",
        ]
        lines.append(f"{row['name']:40}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
