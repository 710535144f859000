"""Measures a mixture of experts against a dense layer with the same FLOPs per token.

On one device and over ranks, forward and backward. All entries are measured in turn in one run:
ratios between rows are meaningful, seconds on a busy machine are not. Tokens choose their experts
by random weights, and none is dropped.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.auxiliary import statistics
from models.feedforward import SwiGLU
from models.init import initialise
from models.moe.base import MixtureOfExperts
from models.moe.switch import Switch
from models.moe.topk import TopKMixture
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.drivers.expert_dispatch import sent_bytes
from scripts.benchmarks.attention import parse_into, table
from scripts.benchmarks.timing import (
    BenchmarkEntry,
    StepCall,
    alternate,
    gathered,
    middle,
    peak_bytes,
)

__all__ = ["ExpertSizes", "measure", "parse", "table"]  # what scripts.bench asks for

BOTH = 2  # experts a token of the second section


@dataclass(frozen=True)
class ExpertSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command.

    ffn is the width of the dense layer.
    """

    tokens: int = 8192
    width: int = 256
    ffn: int = 704
    experts: int = 8
    ranks: int = 2
    threads: int = 1
    repeats: int = 5
    seed: int = 0
    device: str = "cpu"


class ExpertBenchmark:
    """Builds entries; each knows its part of the step on this rank."""

    def __init__(self, sizes: ExpertSizes, group: Any):
        self.sizes = sizes
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        torch.set_num_threads(sizes.threads)
        generator = torch.Generator().manual_seed(sizes.seed)
        self.x = torch.randn(1, sizes.tokens, sizes.width, generator=generator).to(sizes.device)

    def dense(self) -> nn.Module:
        return initialise(SwiGLU(self.sizes.width, self.sizes.ffn), self.sizes.seed).to(
            self.sizes.device
        )

    def switch(self) -> MixtureOfExperts:
        sizes = self.sizes
        layer = Switch(
            sizes.width,
            sizes.ffn,
            experts=sizes.experts,
            capacity_factor=None,
            jitter=0.0,
            router_scale=1.0,
        )
        return _made(layer, sizes)

    def both(self) -> MixtureOfExperts:
        return _made(
            TopKMixture(self.sizes.width, self.sizes.ffn, experts=self.sizes.experts, top=BOTH),
            self.sizes,
        )

    def alone(self, name: str, layer: nn.Module) -> BenchmarkEntry:
        """All tokens in one process, with the threads of all ranks."""
        tokens = self.sizes.tokens if self.rank == 0 else 1
        facts = {"tokens": self.sizes.tokens}
        return BenchmarkEntry(
            f"{name}, one device", facts, _step(layer, self.x[:, :tokens]), alone=True
        )

    def apart(self, name: str, layer: nn.Module) -> BenchmarkEntry:
        """Every rank its tokens, and the whole layer."""
        return BenchmarkEntry(
            f"{name}, tokens shared", {"tokens": self.sizes.tokens}, _step(layer, self._mine())
        )

    def shared(self, layer: MixtureOfExperts) -> BenchmarkEntry:
        """Every rank its tokens and its experts."""
        held = self.sizes.experts // self.ranks
        for key, stack in list(layer.experts.named_parameters()):
            mine = stack.detach()[self.rank * held : (self.rank + 1) * held].clone()
            setattr(layer.experts, key, nn.Parameter(mine))
        communicator = apply_context_parallel(layer, None, experts=self.group)
        step = _step(layer, self._mine())
        step()
        sent = dict(communicator.bytes_sent)
        chosen = gathered(statistics(layer)["/load"].view(self.ranks, held).sum(1).long().tolist())
        given = chosen[self.rank]
        taken = [row[self.rank] for row in chosen]
        x = self._mine()
        formula = sent_bytes(
            given,
            taken,
            self.rank,
            width=x.shape[-1],
            item=x.element_size(),
            experts=self.sizes.experts,
        )
        loads = [sum(column) for column in zip(*chosen)]
        facts = {
            "tokens": self.sizes.tokens,
            "sent_bytes": gathered(sum(sent.values())),
            "formula_bytes": gathered(sum(formula.values())),
            "balance": max(loads) * len(loads) / sum(loads),
        }
        return BenchmarkEntry("experts, both shared", facts, step)

    def _mine(self) -> Tensor:
        return self.x.chunk(self.ranks, 1)[self.rank]


def _made(layer: MixtureOfExperts, sizes: ExpertSizes) -> MixtureOfExperts:
    return initialise(layer, sizes.seed).to(sizes.device)  # type: ignore[return-value]


def _step(layer: nn.Module, x: Tensor) -> StepCall:
    span = Span.line(1, x.shape[1], device=x.device)
    given = x.clone().requires_grad_()

    def step() -> None:
        given.grad = None
        layer.zero_grad()
        layer(given, span).sum().backward()

    return step


def sections(bench: ExpertBenchmark) -> Iterator[tuple[str, list[BenchmarkEntry]]]:
    """Yields each section; its first row is what the others are compared with."""
    layers: dict[str, Callable[[], MixtureOfExperts]] = {
        "one expert": bench.switch,
        "two experts": bench.both,
    }
    for name, made in layers.items():
        entries = [
            bench.alone("dense", bench.dense()),
            bench.alone("experts", made()),
            bench.apart("dense", bench.dense()),
        ]
        entries += [bench.apart("experts", made()), bench.shared(made())]
        yield f"{name} a token, of {bench.sizes.experts}", entries


def measure(sizes: ExpertSizes, group: Any) -> Iterator[dict]:
    """One row of figures after the other; on every rank, in step."""
    bench = ExpertBenchmark(sizes, group)
    for title, entries in sections(bench):
        peaks = [
            gathered(peak_bytes(e.step) if bench.rank == 0 or not e.alone else None)
            for e in entries
        ]
        for entry, runs, peak in zip(
            entries, alternate(entries, sizes.repeats, sizes.threads), peaks
        ):
            each = gathered(middle(runs))
            row = {
                "section": title,
                "name": entry.name,
                "alone": entry.alone,
                "ranks": bench.ranks,
                **entry.facts,
            }
            row["seconds"] = each[0][0]
            row["processor_seconds"] = max(e[1] for e in each)
            yield {**row, "peak_bytes": max((p for p in peak if p is not None), default=None)}


def parse(words: list[str]) -> ExpertSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also numbers that do not divide.
    """
    found = parse_into(ExpertSizes(), words)
    if found.ranks < 2:
        raise ValueError("ranks=1 shares nothing; use ranks=2 or more")
    for name in ("experts", "tokens"):
        if getattr(found, name) % found.ranks:
            raise ValueError(
                f"ranks={found.ranks} do not divide {name}={getattr(found, name)}; use a multiple"
                " of the ranks"
            )
    if found.experts < BOTH:
        raise ValueError(
            f"experts={found.experts} leave no choice of {BOTH}; use experts={BOTH} or more"
        )
    return found
