"""Takes a step at the largest context that a plan finds, and at 1.25 x that, under a memory limit.

Each step runs in a process of its own. A short step first loads everything that stays (libraries,
pools of threads); then the process may map so many bytes more and no further (RLIMIT_DATA). The
step of the context that was found must end, the longer one must run out of memory. Blocks of more
than 32 KiB are given back to the system when they are freed, so that what a process holds is what
its tensors hold; OFFSET is what the buffers of libraries, smaller objects and the holes of a heap
take beside them: 14 MiB in a step of 30,464 tokens in tiles of 256.
"""

import multiprocessing
import os
import re
import resource
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from scripts.benchmarks.attention import parse_into
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.placement import mesh_of
from trainer.planning.advice import largest_context
from trainer.planning.changed_config import with_context
from trainer.planning.devices import read_device, shown
from trainer.planning.rehearsal import Rehearsal
from trainer.planning.step_plan import plan_step

VOCABULARY = 257
SIZES = "model.width=64 model.layers=2 model.heads=4 context_length=1024 batch_tokens=1024"
SIZES += " engine=single"
CASES = (
    "model=full",
    "model=full model.width=256 engine.checkpointing=full engine.tile_tokens=256",
    "model=hybrid model.pattern=[gated_delta,full] model.width=128 engine.checkpointing=selective",
)
LONGER = 1.25
# Large blocks are given back at once, so that what a process holds is what its tensors hold.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "32768", "MALLOC_TRIM_THRESHOLD_": "32768"}
OFFSET = 20 << 20  # bytes
ENDED = "ended"
FULL = "out of memory"


@dataclass(frozen=True)
class ContextSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command.

    Attributes:
        memory: MiB that a step may take; many times OFFSET, which else hides a quarter.
        ranks: of which one is limited.
    """

    memory: int = 256
    ranks: int = 1


def parse(words: list[str]) -> ContextSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also where more ranks are asked for than one.
    """
    found = parse_into(ContextSizes(), words)
    if found.ranks > 1:
        raise ValueError(f"ranks={found.ranks}: one rank is limited at a time; use ranks=1")
    return found


def measure(sizes: ContextSizes, group: Any) -> Iterator[dict]:
    """Yields a row for each case; `group` is of this one rank."""
    assert dist.get_world_size(group) == 1
    yield from measure_cases(sizes, CASES)


def measure_cases(sizes: ContextSizes, cases: Sequence[str]) -> Iterator[dict]:
    """Yields a row for each config."""
    memory = sizes.memory << 20
    for words in cases:
        context = _apart(planned_context, words, memory)
        longer = int(LONGER * context)
        yield {
            "case": words,
            "memory_bytes": memory,
            "context": context,
            "at_context": _apart(limited_step, words, context, memory),
            "longer": longer,
            "at_longer": _apart(limited_step, words, longer, memory),
        }


def _apart(function: Any, *args: Any) -> Any:
    """Calls a function in a fresh process whose allocator is set by MALLOC."""
    before = {name: os.environ.get(name) for name in MALLOC}
    os.environ.update(MALLOC)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(function, *args).result()
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def planned_context(words: str, memory_bytes: int) -> int:
    """Returns the largest context whose step fits into so many bytes of tensors, by plans."""
    device = read_device("cpu")

    def peak_of(config: Config) -> int:
        return plan_step(config, VOCABULARY, 0, device).peak_bytes

    return largest_context(case_config(words), memory_bytes, peak_of)


def limited_step(words: str, context: int, memory_bytes: int) -> str:
    """Takes a step of that context with so many bytes more than a short step leaves behind."""
    torch.set_num_threads(1)
    with tempfile.NamedTemporaryFile() as meeting:
        address = f"file://{meeting.name}"
        dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    _step(with_context(case_config(words), 256))
    limit = _data_bytes() + OFFSET + memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        # A library that finds no room for a buffer may go on without a result, which is not finite.
        ended = _step(with_context(case_config(words), context))
    except MemoryError:
        return FULL
    except RuntimeError as error:
        if "can't allocate memory" in str(error) or "bad_alloc" in str(error):
            return FULL
        raise
    return ENDED if ended else FULL


def _step(config: Config) -> bool:
    """Takes a step; returns whether its numbers were finite."""
    with torch.device("meta"):
        model = build_model(config, VOCABULARY)
    rehearsal = Rehearsal(config, mesh_of(config), model)
    rehearsal.step()
    return rehearsal.progress.tokens > 0


def _data_bytes() -> int:
    """Returns the bytes of this process that RLIMIT_DATA counts."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) << 10


def case_config(words: str) -> Config:
    """Returns the config of a case."""
    config = compose([*SIZES.split(), *words.split()]).config
    assert config is not None, words
    return config


def table(rows: list[dict]) -> str:
    """Rows as text."""
    lines = [
        f"{shown(rows[0]['memory_bytes'])} for a step",
        f"{'context':>9} {'':14}{'1.25 x':>9} {'':14}  case",
    ]
    for row in rows:
        lines.append(
            f"{row['context']:>9} {row['at_context']:14}{row['longer']:>9}"
            f" {row['at_longer']:14}  {row['case']}"
        )
    return "\n".join(lines)
