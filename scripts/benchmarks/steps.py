"""Measures steps of the quickstart beside plain loops of the same model, in turn, in one run.

Ours are whole commands, `python -m trainer experiment=quickstart`, whose metrics.jsonl is read:
what a user gets, with reading, masks of documents and logging. Theirs run in this process with the
threads of all cores, get the same batches from memory and log nothing: the model in plain PyTorch
with a dense mask of documents, without one, and transformers' Llama without one.

Seconds from the command to step 1 are those of the first command; they are told by the lines of its
console: `starting` ends where ranks have read the data (checks, processes, imports), `building`
where step 1 begins.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.plain_model import PlainDecoder, document_mask
from trainer.config.build_model import ffn_width
from trainer.config.schema import Config
from trainer.objectives.stream import open_rows
from trainer.preflight.prepare import load_config

QUICKSTART = "experiment=quickstart"
QUIET = ("evaluation.every=0", "checkpoint.every=0", "logger=[]", "log.plots=false", "log.every=1")
OURS = {
    "quickstart": (),
    "fsdp, two ranks": ("engine=fsdp",),
    "single, one rank": ("parallel.context=1", "parallel.method=auto", "engine=single"),
    "fsdp, one rank": ("parallel.context=1", "parallel.method=auto", "engine=fsdp"),
}
COMPILED = "single, compiled"
MASKED = "plain, dense mask of documents"
UNMASKED = "plain, no mask of documents"
LLAMA = "transformers' Llama, no mask of documents"
WARM_UP = 2  # steps that are not counted
WANTED = {MASKED: 1.4, UNMASKED: 1.0, LLAMA: 1.0}  # of the quickstart's tokens/s over theirs
ADAM = {"betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0

LossOf = Callable[[Tensor, Tensor, Tensor], Tensor]  # (tokens, targets, documents), each [B, T]


@dataclass(frozen=True)
class StepsSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    steps: int = 4
    repeats: int = 2
    threads: int = 0
    ranks: int = 1


def parse(words: list[str]) -> StepsSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also where more than one rank is asked for.
    """
    sizes = parse_into(StepsSizes(), words)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: each entry starts its own; use ranks=1")
    return sizes


@dataclass
class PlainLoop:
    """A model trained as a loop of a page would, one step after another.

    Args:
        model: whose parameters are trained.
        loss_of: mean loss of rows.
        batches: (tokens, targets, documents) of each step, over and over.
    """

    model: nn.Module
    loss_of: LossOf
    batches: list[tuple[Tensor, Tensor, Tensor]]
    taken: int = 0

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.AdamW(self.model.parameters(), lr=1e-3, **ADAM)

    def step(self) -> float:
        """Takes a step; returns its seconds."""
        batch = self.batches[self.taken % len(self.batches)]
        self.taken += 1
        began = time.perf_counter()
        self.loss_of(*batch).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return time.perf_counter() - began


def measure(sizes: StepsSizes, group: Any) -> Iterator[dict]:
    """Yields a row of figures for each entry."""
    config = load_config([QUICKSTART])
    threads = sizes.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    plain = plain_loops(config, batches_of(config, sizes.steps + WARM_UP))
    seconds: dict[str, list[float]] = defaultdict(list)
    start: dict[str, float] = {}
    for turn in range(sizes.repeats):
        for name, words in OURS.items():
            times, phases = trained(words, sizes.steps + WARM_UP)
            seconds[name] += times[WARM_UP:]
            start = start or phases
        for name, loop in plain.items():
            times = [loop.step() for _ in range(sizes.steps + WARM_UP)]
            seconds[name] += times[WARM_UP:]
        if turn == 0:
            words = (*OURS["single, one rank"], "engine.compile=true")
            seconds[COMPILED] += trained(words, sizes.steps + WARM_UP)[0][WARM_UP:]
    for name, times in seconds.items():
        yield {
            "name": name,
            "step_s": median(times),
            "fastest_s": min(times),
            "tokens_per_second": config.batch_tokens / median(times),
            "threads": threads,
            **(start if name == "quickstart" else {}),
        }


def batches_of(config: Config, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Returns the first batches of a run: (tokens, targets, documents), each [B, T]."""
    stream = open_rows(config, "train")
    cursor = stream.start()
    found = []
    for _ in range(count):
        batch, cursor = stream.read(cursor)
        found.append((batch.tokens[:, :-1], batch.tokens[:, 1:], batch.doc[:, :-1]))
    return found


def plain_loops(
    config: Config, batches: list[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, PlainLoop]:
    """Returns the loops that the quickstart is held against."""
    model = config.model
    kv_heads = model.kv_heads or model.heads
    vocabulary = open_rows(config, "train").vocabulary
    plain = PlainDecoder(
        vocabulary=vocabulary,
        width=model.width,
        layers=model.layers,
        heads=model.heads,
        kv_heads=kv_heads,
        ffn=ffn_width(config),
        context=config.context_length,
    )
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=model.width,
            intermediate_size=ffn_width(config),
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=config.context_length,
            use_cache=False,
        )
    )

    def masked(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        return plain(tokens, targets, document_mask(documents))

    def unmasked(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        return plain(tokens, targets, None)

    def of_llama(tokens: Tensor, targets: Tensor, documents: Tensor) -> Tensor:
        logits = llama(tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return {
        MASKED: PlainLoop(plain, masked, batches),
        UNMASKED: PlainLoop(plain, unmasked, batches),
        LLAMA: PlainLoop(llama, of_llama, batches),
    }


def trained(words: tuple[str, ...], steps: int) -> tuple[list[float], dict[str, float]]:
    """Runs the quickstart for so many steps.

    Returns:
        Seconds of each step; and those from the command to step 1, by what passed.

    Raises:
        RuntimeError: the run failed; with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-u", "-m", "trainer", QUICKSTART, *QUIET, *words]
        command += [f"steps={steps}", f"run_dir={run_dir}"]
        began = time.perf_counter()
        # As from a shell: the launcher divides the cores among the ranks.
        left_out = ("OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        environment = {key: value for key, value in os.environ.items() if key not in left_out}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        printed = []
        moments: dict[str, float] = {}
        for line in process.stdout:
            printed.append(line)
            words_of_line = line.split()
            if words_of_line:
                moments.setdefault(words_of_line[0], time.perf_counter() - began)
        if process.wait():
            raise RuntimeError("".join(printed))
        rows = (run_dir / "metrics.jsonl").read_text().splitlines()
        times = [json.loads(row)["step_seconds"] for row in rows]
    first_step_s = moments["step"] - times[0]
    return times, {
        "first_step_s": first_step_s,
        "starting_s": moments["data:"],
        "building_s": first_step_s - moments["data:"],
    }


def table(rows: list[dict]) -> str:
    """Rows as text."""
    found = {row["name"]: row for row in rows}
    ours = found["quickstart"]["tokens_per_second"]
    lines = [f"{'s a step':>10}{'fastest':>9}{'tokens/s':>10}{'quickstart':>12}{'asked':>7}"]
    for name, row in found.items():
        asked = f"{WANTED[name]:.1f} x" if name in WANTED else ""
        lines.append(
            f"{row['step_s']:>10.3f}{row['fastest_s']:>9.3f}{row['tokens_per_second']:>10,.0f}"
            f"{ours / row['tokens_per_second']:>10.2f} x{asked:>7}  {name}"
        )
    row = found["quickstart"]
    lines.append(
        f"from the command to step 1: {row['first_step_s']:.1f} s; {row['starting_s']:.1f} until"
        f" ranks have their data, {row['building_s']:.1f} until they train; 10 is asked"
    )
    return "\n".join(lines)
