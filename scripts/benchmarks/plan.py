"""Measures the peak memory of a step on real ranks and holds the planned one against it.

Each case is a config of that many ranks on the CPU. Its steps are measured by the allocator's own
events (trainer/planning/measured_step.py); rank 0 and the last rank are planned.
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from scripts.benchmarks.attention import parse_into
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.placement import mesh_of
from trainer.planning.devices import read_device, shown
from trainer.planning.measured_step import measure_step
from trainer.planning.step_plan import plan_step

VOCABULARY = 257
SIZES = "model.width=128 model.layers=3 model.heads=4 context_length=768 batch_tokens=1536"
SIZES += " parallel.micro_batch=1"
CASES = {
    1: (
        "engine=single",
        "engine=single engine.checkpointing=full",
        "engine=single engine.checkpointing=selective",
        "engine=single engine.tile_tokens=128",
        "engine=single precision=bfloat16",
        "engine=single model=moe_topk",
        "engine=single model=hybrid",
        "engine=single model=sliding",
        "engine=single memory=segments memory.length=256",
        "engine=single parallel.time=3",
        "engine=single model=decoder mixer=compressed mixer.top=24",
        "engine=single model=decoder mixer=lsh",
    ),
    2: (
        "engine=fsdp parallel.context=2 parallel.method=ring",
        "engine=fsdp parallel.context=2 parallel.method=ulysses engine.checkpointing=full",
        "engine=fsdp parallel.context=2 parallel.method=allgather engine.tile_tokens=128",
        "engine=fsdp parallel.data=2 precision=bfloat16 engine.checkpointing=selective",
        "engine=single parallel.context=2 parallel.method=ring",
        "engine=fsdp parallel.context=2 model=moe_topk parallel.experts=2",
        # The last: DeepSpeed holds on to an engine, whose end the next case would be measured by.
        "engine=deepspeed parallel.data=2 model.width=512",
    ),
    3: (
        "engine=fsdp parallel.context=3 parallel.method=ring engine.checkpointing=full",
        "engine=fsdp parallel.context=3 model=gated_delta",
        "engine=single parallel.context=3 parallel.method=allgather",
    ),
    4: (
        "engine=fsdp parallel.context=2 parallel.data=2 parallel.method=ulysses",
        "engine=fsdp parallel.context=4 parallel.method=usp parallel.ulysses=2 parallel.ring=2",
        "engine=fsdp parallel.data=4 engine.replicate=2",
    ),
}


@dataclass(frozen=True)
class PlanSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    ranks: int = 1


def parse(words: list[str]) -> PlanSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also of a number of ranks that no case has.
    """
    found = parse_into(PlanSizes(), words)
    if found.ranks not in CASES:
        raise ValueError(f"ranks={found.ranks}: there are cases of 1 to {max(CASES)} ranks")
    return found


def measure(sizes: PlanSizes, group: Any) -> Iterator[dict]:
    """Yields a row of figures for each case; those of the rank whose plan is furthest off."""
    torch.set_num_threads(1)
    # A plan makes process groups of its own, so another process makes it.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as planner:
        for words in CASES[sizes.ranks]:
            config = case_config(words)
            here = measure_step(config, mesh_of(config), meta_model(config))
            found: list[Any] = [None] * sizes.ranks
            dist.all_gather_object(found, here, group=group)
            if dist.get_rank(group) != 0:
                yield {}
                continue
            rows = []
            for rank in sorted({0, sizes.ranks - 1}):
                planned, sent = planner.submit(planned_step, words, rank).result()
                ratio = planned / found[rank].peak_bytes
                rows.append(
                    {
                        "case": words,
                        "rank": rank,
                        "planned_bytes": planned,
                        "measured_bytes": found[rank].peak_bytes,
                        "ratio": ratio,
                        "all_peaks": found[rank].peaks,
                        "sent_bytes": sum(found[rank].sent_bytes.values()),
                        "sent_as_planned": sent == found[rank].sent_bytes,
                    }
                )
            yield max(rows, key=lambda row: abs(row["ratio"] - 1))


def planned_step(words: str, rank: int) -> tuple[int, dict[str, int]]:
    """Returns the planned peak and the bytes that drivers send, of a case."""
    plan = plan_step(case_config(words), VOCABULARY, rank, read_device("cpu"))
    return plan.peak_bytes, plan.sent_bytes


def case_config(words: str) -> Config:
    """Returns the config of a case."""
    config = compose([*SIZES.split(), *words.split()]).config
    assert config is not None, words
    return config


def meta_model(config: Config) -> nn.Module:
    """Returns the model of a config on the meta device."""
    with torch.device("meta"):
        return build_model(config, VOCABULARY)


def table(rows: list[dict]) -> str:
    """Rows as text."""
    lines = [f"{'planned':>12}{'measured':>12}{'ratio':>8}  bytes sent  case"]
    for row in rows:
        sizes = [shown(row[key]) for key in ("planned_bytes", "measured_bytes")]
        same = "as planned" if row["sent_as_planned"] else "OTHERS"
        lines.append(f"{sizes[0]:>12}{sizes[1]:>12}{row['ratio']:>8.3f}  {same}  {row['case']}")
    furthest = max(abs(row["ratio"] - 1) for row in rows)
    return "\n".join([*lines, f"furthest off: {furthest:.1%}; 10 % is asked"])
