"""Measures the model of any settings beside full attention in the same sizes.

`python -m scripts.bench part mixer._target_=mine.Averaged` names a part as a run does. A step is
forward and backward of one row of random tokens, one document, on one device; the optimiser has no
part in it. Medians of alternated runs; growth is the time of a row `times` as long in units of the
shorter row's. "beside full" is the time and the peak in units of model=full's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.cost.parameters import count_parameters
from models.layer import hook
from models.micro_batch import MicroBatch
from models.span import Span
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.timing import BenchmarkEntry, alternate, middle, peak_bytes
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.library.build import initial_model
from trainer.objectives.stream import vocabulary_of
from trainer.preflight.match import reference
from trainer.preflight.prepare import load_config


@dataclass(frozen=True)
class PartSizes:
    """Settings of the benchmark; every other word is a setting of a run."""

    tokens: int = 2048
    times: int = 2
    repeats: int = 3
    threads: int = 1
    seed: int = 0
    ranks: int = 1
    device: str = "cpu"


@dataclass(frozen=True)
class PartBenchmark(PartSizes):
    """Sizes, and the settings of the run whose model is measured.

    Attributes:
        settings: KEY=VALUE words.
    """

    settings: tuple[str, ...] = ()


def parse(words: list[str]) -> PartBenchmark:
    """Sorts the words of the command.

    Raises:
        ValueError: more than one rank, or what parse_into and the check of a run say.
    """
    own = [word for word in words if word.partition("=")[0] in vars(PartSizes())]
    settings = [word for word in words if word not in own]
    sizes = parse_into(PartSizes(), own)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: one device is measured; use ranks=1")
    bench = PartBenchmark(**vars(sizes), settings=tuple(settings))
    try:
        configs(bench)
    except UserError as error:
        raise ValueError(str(error)) from error
    return bench


def configs(bench: PartBenchmark) -> dict[str, Config]:
    """Returns the config that is asked for, and full attention in the same sizes.

    Raises:
        UserError: settings that cannot be honoured.
    """
    longest = bench.tokens * bench.times
    words = [*bench.settings, f"context_length={longest}", f"batch_tokens={longest}"]
    asked = load_config(words, say=lambda line: None)
    return {"asked": asked, "full": reference(asked, words)}


def measure(bench: PartBenchmark, group: Any) -> Iterator[dict]:
    """A row of figures for each of the two models; `group` is of this one rank."""
    assert dist.get_world_size(group) == 1
    torch.set_num_threads(bench.threads)
    entries: list[BenchmarkEntry] = []
    for name, config in configs(bench).items():
        model = initial_model(config).train().to(bench.device)
        if hook(model, "reads_source"):
            raise UserError("scripts.bench part measures models that read one row, and no source")
        facts = {"model": name, "parameters": count_parameters(model).total}
        for tokens in (bench.tokens, bench.tokens * bench.times):
            step = _step(bench, model, vocabulary_of(config), tokens)
            step()  # what is allocated once
            entries.append(BenchmarkEntry(name, facts | {"tokens": tokens}, step))
    runs = [middle(each) for each in alternate(entries, bench.repeats, bench.threads)]
    rows = []
    for entry, taken in zip(entries, runs, strict=True):
        figures = {"seconds": taken.seconds, "processor_seconds": taken.processor_seconds}
        rows.append({**entry.facts, **figures, "bytes": peak_bytes(entry.step)})
    for few, many in (rows[:2], rows[2:]):
        many["growth"] = many["seconds"] / few["seconds"]
    for row, beside in zip(rows, [*rows[2:], *rows[2:]], strict=True):
        row["beside_full"] = row["seconds"] / beside["seconds"]
        yield row


def _step(
    bench: PartBenchmark, model: nn.Module, vocabulary: int, tokens: int
) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(bench.seed)
    row = torch.randint(vocabulary, (1, tokens), generator=generator).to(bench.device)
    span = Span.line(1, tokens, bench.device)

    def step() -> None:
        model.zero_grad()
        model(MicroBatch(row, Span.of(span.pos, span.doc), row)).sum().backward()

    return step


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("model", "parameters", "tokens", "ms", "growth", "peak MiB", "beside full")
    lines = ["".join(f"{name:>13}" for name in columns)]
    for row in rows:
        peak = row["bytes"]
        cells = [row["model"], f"{row['parameters']:,}", f"{row['tokens']:,}"]
        cells.append(f"{row['seconds'] * 1000:.1f}")
        cells.append(f"{row['growth']:.2f}" if "growth" in row else "-")
        cells.append("-" if peak is None else f"{peak / 2**20:,.0f}")
        cells.append(f"{row['beside_full']:.2f}")
        lines.append("".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
