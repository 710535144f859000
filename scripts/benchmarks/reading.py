"""Measures what a rank waits for the input of a step, and what reading costs on many data ranks.

One row of packed documents of the standard library is shared by `context` ranks, of which one is
played: it reads, hashes and cuts as in training, and asks for the plans of three layers (a ring of
full attention, a window that fetches its keys, a scan). The step that is computed meanwhile is
played by a sleep, as a device would compute it.

Then one of 1 to 256 data ranks is played, with a row of `row_tokens` each: processor time of
reading, hashing and cutting a step, of its own row and of the whole batch.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from models.kernels.block_plan import plan_rows
from models.kernels.scan_chunks import chunk_layout
from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.span import Span
from parallel.drivers.key_exchange import gather_plan
from parallel.drivers.scan import run_order
from parallel.mesh import Axis, Mesh
from scripts.benchmarks.attention import parse_into
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Cursor, OwnRows, Stream
from trainer.data.streams.prefetch import Prefetcher, StepInput
from trainer.objectives.stream import open_rows
from trainer.preflight.prepare import load_config

DATA_RANKS = (1, 4, 16, 64, 256)
WINDOW = 1024
CHUNK = 64
WAYS = {  # (steps ahead, whether plans are made ahead too)
    "as needed": (0, False),
    "read ahead": (1, False),
    "and planned ahead": (1, True),
}


@dataclass(frozen=True)
class ReadingSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 1 << 20
    context: int = 8
    steps: int = 6
    step_ms: int = 2000
    row_tokens: int = 16384
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
    """Yields a row of figures for each way to read, then for each number of data ranks."""
    stream = _opened(sizes, sizes.tokens, 1)
    mesh = replace(Mesh.alone(sizes.device), context=Axis(0, sizes.context))
    share = BatchSharder(mesh, rows=1, context_length=sizes.tokens, micro_batch=1, policy="zigzag")
    documents = int(stream.read(stream.start())[0].span().opens().sum())
    for way, (ahead, planned) in WAYS.items():
        found = _steps(TimedPrefetcher(stream, share, ahead, planned=planned), sizes)
        yield {"way": way, **found, "step_s": sizes.step_ms / 1000, "documents": documents}
    for ranks in DATA_RANKS:
        stream = _opened(sizes, sizes.row_tokens, ranks)
        mesh = replace(Mesh.alone(sizes.device), data=Axis(ranks - 1, ranks))
        share = BatchSharder(
            mesh, rows=ranks, context_length=sizes.row_tokens, micro_batch=1, policy="zigzag"
        )
        yield {
            "data_ranks": ranks,
            "row_tokens": sizes.row_tokens,
            "own_s": _reading_s(stream, share, sizes.steps),
            "whole_s": _reading_s(WholeBatches(stream), share, sizes.steps),
        }


def _opened(sizes: ReadingSizes, tokens: int, rows: int) -> Stream:
    words = [f"context_length={tokens}", f"batch_tokens={rows * tokens}", f"seed={sizes.seed}"]
    # No model is built, so it need not fit into the memory.
    words += ["data=stdlib", "parallel.data=1", "launch.force=true"]
    return open_rows(load_config(words), "train")


def _layers(span: Span) -> None:
    """Asks for the plans of a ring, of a window that fetches its keys, and of a scan."""
    causal = Causal() & SameDocument()
    for source in span.sharding.spans:
        plan_rows(causal, span, source)
    window = causal & SlidingWindow(WINDOW)
    fetched = gather_plan(window, span, span, torch.zeros(1, dtype=torch.long))
    plan_rows(window, span, fetched.span)
    chunk_layout(span, CHUNK, run_order(span).lengths)


class TimedPrefetcher(Prefetcher):
    """A prefetcher that tells its thread's processor time; `planned=False` leaves plans out."""

    def __init__(self, stream: Stream, share: BatchSharder, ahead: int, *, planned: bool):
        super().__init__(stream, share, ahead)
        self.planned = planned
        self.busy: list[float] = []

    def load_planned(self, cursor: Cursor) -> StepInput:
        """See Prefetcher.load_planned; the thread calls it."""
        began = time.thread_time()
        given = super().load_planned(cursor) if self.planned else self.load(cursor)
        self.busy.append(time.thread_time() - began)
        return given


def _steps(prefetcher: TimedPrefetcher, sizes: ReadingSizes) -> dict[str, float]:
    """Takes steps; returns the seconds that each waits for its input, and the processor time of
    the plans that it makes itself and of all that the thread does."""
    cursor = prefetcher.stream.start()
    waits, plans = [], []
    # The first two steps are taken without anything noted and planned before.
    for _ in range(sizes.steps + 2):
        began = time.perf_counter()
        given = prefetcher.read(cursor)
        waits.append(time.perf_counter() - began)
        cursor = given.cursor
        for (piece, *_), _ in given.micro_batches():
            began = time.thread_time()
            with prefetcher.plans.listening(piece):
                _layers(piece.span)
            plans.append(time.thread_time() - began)
        time.sleep(sizes.step_ms / 1000)
    prefetcher.close()
    return {
        "first_s": waits[0],
        "wait_s": sum(waits[2:]) / sizes.steps,
        "plans_s": sum(plans[2:]) / sizes.steps,
        "worst_s": max(waits[2:]),
        "thread_s": sum(prefetcher.busy[2:]) / max(1, len(prefetcher.busy[2:])),
    }


class WholeBatches:
    """A stream whose rows are cut from whole batches, as by the default of Stream.read_rows."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.fingerprint = stream.fingerprint
        self.start = stream.start
        self.read = stream.read

    def read_rows(self, cursor: Any, first: int, last: int) -> OwnRows:
        """See Stream.read_rows."""
        return Stream.read_rows(self.stream, cursor, first, last)


def _reading_s(stream: Any, share: BatchSharder, steps: int) -> float:
    """Returns the processor time of reading a step, the least of several."""
    prefetcher = Prefetcher(stream, share, 0)
    cursor = stream.start()
    taken = []
    for _ in range(steps + 1):
        began = time.process_time()
        cursor = prefetcher.read(cursor).cursor
        taken.append(time.process_time() - began)
    # The first step also orders the epoch's documents.
    return min(taken[1:])


def table(rows: list[dict]) -> str:
    """Rows as text."""
    ways = [row for row in rows if "way" in row]
    columns = ("first wait s", "waits s", "worst wait s", "plans CPU s", "thread CPU s")
    lines = [
        f"a row of {ways[0]['documents']} documents; a step is computed in {ways[0]['step_s']:g} s",
        f"{'input':>18}" + "".join(f"{name:>17}" for name in columns),
    ]
    for row in ways:
        figures = (row[key] for key in ("first_s", "wait_s", "worst_s", "plans_s", "thread_s"))
        lines.append(f"{row['way']:>18}" + "".join(f"{figure:>17.4f}" for figure in figures))
    dealt = [row for row in rows if "data_ranks" in row]
    lines += ["", f"processor time of a rank's reading, a row of {dealt[0]['row_tokens']} each"]
    columns = ("data ranks", "own row ms", "whole batch ms")
    lines.append("".join(f"{name:>18}" for name in columns))
    for row in dealt:
        cells = (f"{row['data_ranks']}", f"{row['own_s'] * 1e3:.2f}", f"{row['whole_s'] * 1e3:.2f}")
        lines.append("".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)
