"""Measures what a rank waits for the batch of a step, with and without reading ahead.

One row of packed documents of the standard library is shared by `context` ranks, of which one is
played: it reads, compares by a hash, and cuts as in training. The step that is computed meanwhile
is played by a sleep, as a device would compute it.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.mesh import Axis, Mesh
from scripts.benchmarks.attention import parse_into
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Stream
from trainer.data.streams.prefetch import Prefetcher
from trainer.objectives.stream import open_rows
from trainer.preflight.prepare import load_config


@dataclass(frozen=True)
class ReadingSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 1 << 20
    context: int = 8
    steps: int = 6
    step_ms: int = 2000
    seed: int = 0
    ranks: int = 1
    device: str = "cpu"


def parse(words: list[str]) -> ReadingSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also where more than one rank is asked for.
    """
    sizes = parse_into(ReadingSizes(), words)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: one rank is played; use ranks=1")
    return sizes


def measure(sizes: ReadingSizes, group: Any) -> Iterator[dict]:
    """Yields a row of figures for each way to read."""
    config = load_config(
        [
            "data=stdlib",
            f"context_length={sizes.tokens}",
            f"batch_tokens={sizes.tokens}",
            f"seed={sizes.seed}",
        ]
    )
    stream = open_rows(config, "train")
    mesh = replace(Mesh.alone(sizes.device), context=Axis(0, sizes.context))
    share = BatchSharder(
        mesh, rows=1, context_length=sizes.tokens, micro_batch=1, policy=config.parallel.layout
    )
    for ahead in (0, 1):
        waits = _waits(stream, share, ahead, sizes)
        yield {
            "ahead": ahead,
            "first_s": waits[0],
            "wait_s": sum(waits[1:]) / len(waits[1:]),
            "worst_s": max(waits[1:]),
            "step_s": sizes.step_ms / 1000,
            "documents": int(stream.read(stream.start())[0].span().opens().sum()),
        }


def _waits(stream: Stream, share: BatchSharder, ahead: int, sizes: ReadingSizes) -> list[float]:
    """Returns the seconds that each step waits for its input."""
    prefetcher = Prefetcher(stream, share, ahead)
    cursor = stream.start()
    waits = []
    for _ in range(sizes.steps + 1):
        began = time.perf_counter()
        given = prefetcher.read(cursor)
        waits.append(time.perf_counter() - began)
        cursor = given.cursor
        time.sleep(sizes.step_ms / 1000)
    prefetcher.close()
    return waits


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("read ahead", "first step s", "mean wait s", "worst s")
    lines = [
        f"a row of {rows[0]['documents']} documents; a step is computed in {rows[0]['step_s']:g} s",
        "".join(f"{name:>14}" for name in columns),
    ]
    for row in rows:
        cells = (
            f"{row['ahead']} steps",
            f"{row['first_s']:.3f}",
            f"{row['wait_s']:.3f}",
            f"{row['worst_s']:.3f}",
        )
        lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)
