"""Measures a row cut in time: its step and peak memory, and the price beside full checkpointing.

A step is forward and backward of one row of random bytes, one document, in pieces of `piece` tokens
each, on one device; the optimiser has no part in it. `hybrid` is RWKV-7 with a window in every
third layer; `hybrid_full` has full attention there, whose time grows with the square of the row, so
it is measured only where `models=` names it. Growth is the peak of a row `times` as long in
units of the shorter row's; the parameters, their gradients and the row itself were there before and
are in neither. The price is the time of a row of `compare` tokens in pieces, in units of the same
row at once under full activation checkpointing, with that row's peaks. Medians of alternated runs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.attention.sliding import Sliding
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.recurrent.rwkv7 import Rwkv7
from models.span import Span
from parallel.engines.base import blocks_of
from parallel.parallelize import compute_again
from parallel.row_pieces import piece_state
from parallel.rows_in_time import run_in_pieces
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.timing import BenchmarkEntry, alternate, middle, peak_bytes

VOCABULARY = 256
# The mixers of the layers, in turn.
MODELS = {
    "rwkv7": ("rwkv7",),
    "sliding": ("sliding",),
    "hybrid": ("rwkv7", "rwkv7", "sliding"),
    "hybrid_full": ("rwkv7", "rwkv7", "full"),
}
GROWTH_GOAL = 1.1  # the most that the peak may grow where what a piece leaves has one size
PRICE_GOAL = 1.15


@dataclass(frozen=True)
class TimeSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 262144
    times: int = 4
    piece: int = 16384
    compare: int = 32768
    width: int = 192
    heads: int = 6
    layers: int = 6
    window: int = 512
    repeats: int = 1
    threads: int = 2
    seed: int = 0
    models: str = "rwkv7,sliding,hybrid"
    ranks: int = 1
    device: str = "cpu"


def parse(words: list[str]) -> TimeSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: more than one rank, a model that is none of MODELS, pieces that are longer than
            a row, or what parse_into says.
    """
    sizes = parse_into(TimeSizes(), words)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: one device is measured; use ranks=1")
    unknown = [name for name in sizes.models.split(",") if name not in MODELS]
    if unknown:
        raise ValueError(f"models={sizes.models}: choose of {', '.join(MODELS)}, between commas")
    if sizes.piece > min(sizes.tokens, sizes.compare):
        raise ValueError(
            f"piece={sizes.piece}: a row of tokens={sizes.tokens} or compare={sizes.compare} is"
            " shorter; use smaller pieces"
        )
    return sizes


class TimeBenchmark:
    """Builds the models and their steps."""

    def __init__(self, sizes: TimeSizes):
        self.sizes = sizes

    def mixers(self, name: str) -> list[nn.Module]:
        """Returns one mixer for each layer of one of MODELS."""
        sizes = self.sizes
        heads = max(1, sizes.heads // 3)
        built: dict[str, Callable[[int], nn.Module]] = {
            "rwkv7": lambda layer: Rwkv7(sizes.width, sizes.heads, layer, sizes.layers),
            "sliding": lambda layer: Sliding(
                sizes.width, sizes.heads, heads, Rope(), window=sizes.window
            ),
            "full": lambda layer: Attention(sizes.width, sizes.heads, heads, Rope()),
        }
        kinds = MODELS[name]
        return [built[kinds[layer % len(kinds)]](layer) for layer in range(sizes.layers)]

    def model(self, name: str, *, again: bool = False) -> nn.Module:
        """Returns a decoder, with full activation checkpointing where `again`."""
        sizes = self.sizes
        mixers = self.mixers(name)
        feedforwards = [SwiGLU(sizes.width, 8 * sizes.width // 3) for _ in mixers]
        model = Decoder(VOCABULARY, sizes.width, mixers, feedforwards)
        model = initialise(model, seed=sizes.seed).to(sizes.device)
        name_stateful_modules(model)
        for block in blocks_of(model) if again else ():
            block.forward = compute_again(block.forward)
        # The gradients are there before a step, as in all but the first of a run.
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        return model

    def row(self, tokens: int) -> tuple[Tensor, Span]:
        """Returns a row of random bytes and its addresses, [1, T]."""
        generator = torch.Generator().manual_seed(self.sizes.seed)
        row = torch.randint(VOCABULARY, (1, tokens), generator=generator)
        return row.to(self.sizes.device), Span.line(1, tokens, self.sizes.device)

    def at_once(self, model: nn.Module, tokens: int) -> Callable[[], None]:
        """Returns the step of a whole row."""
        row, span = self.row(tokens)

        def step() -> None:
            model(MicroBatch(row, Span.of(span.pos, span.doc), row)).sum().backward()

        return step

    def in_pieces(self, model: nn.Module, tokens: int) -> Callable[[], None]:
        """Returns the step of a row in pieces."""
        row, span = self.row(tokens)
        parts = row.split(self.sizes.piece, 1)
        positions = zip(span.pos.split(self.sizes.piece, 1), span.doc.split(self.sizes.piece, 1))
        spans = [Span.of(pos, doc) for pos, doc in positions]
        untaught = [torch.full_like(part, IGNORE) for part in parts]

        def step() -> None:
            run_in_pieces(
                piece_state(spans),
                lambda number, at: model(MicroBatch(parts[number], at, untaught[number])),
                lambda number, at: model(MicroBatch(parts[number], at, parts[number])).sum(),
                lambda loss, last: loss.backward(),
            )

        return step


def measure(sizes: TimeSizes, group: Any) -> Iterator[dict]:
    """A row of figures for each model; `group` is of this one rank."""
    assert dist.get_world_size(group) == 1
    torch.set_num_threads(sizes.threads)
    bench = TimeBenchmark(sizes)
    for name in sizes.models.split(","):
        model = bench.model(name)
        bench.in_pieces(model, sizes.piece)()  # what is allocated once
        found: dict = {"model": name, "piece": sizes.piece}
        for key, tokens in (("few", sizes.tokens), ("many", sizes.tokens * sizes.times)):
            step = bench.in_pieces(model, tokens)
            found |= {f"{key}_tokens": tokens, f"{key}_bytes": peak_bytes(step)}
        if found["few_bytes"] and found["many_bytes"]:
            found["growth"] = found["many_bytes"] / found["few_bytes"]
        yield found | _price(bench, name, model)


def _price(bench: TimeBenchmark, name: str, model: nn.Module) -> dict:
    """Returns the time and peak of one row in pieces and at once under full checkpointing."""
    sizes = bench.sizes
    steps = {
        "pieces": bench.in_pieces(model, sizes.compare),
        "checkpointing": bench.at_once(bench.model(name, again=True), sizes.compare),
    }
    entries = [BenchmarkEntry(key, {}, step) for key, step in steps.items()]
    runs = [middle(each) for each in alternate(entries, sizes.repeats, sizes.threads)]
    found: dict = {"compared_tokens": sizes.compare}
    for (key, step), taken in zip(steps.items(), runs, strict=True):
        found |= {
            f"{key}_seconds": taken.seconds,
            f"{key}_processor_seconds": taken.processor_seconds,
            f"{key}_bytes": peak_bytes(step),
        }
    found["price"] = found["pieces_seconds"] / found["checkpointing_seconds"]
    found["price_by_cpu"] = (
        found["pieces_processor_seconds"] / found["checkpointing_processor_seconds"]
    )
    return found


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("model", "tokens", "peak MiB", "tokens", "peak MiB", "growth", "price", "by cpu")
    lines = [
        f"growth of the peak: at most {GROWTH_GOAL} is asked of rwkv7 and sliding; price beside"
        f" full checkpointing: at most {PRICE_GOAL}",
        "".join(f"{name:>12}" for name in columns),
    ]
    for row in rows:
        cells = [row["model"]]
        for key in ("few", "many"):
            cells += [f"{row[f'{key}_tokens']:,}", _mebibytes(row[f"{key}_bytes"])]
        growth = row.get("growth")
        cells += ["-" if growth is None else f"{growth:.2f}"]
        cells += [f"{row['price']:.2f}", f"{row['price_by_cpu']:.2f}"]
        lines.append("".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"
