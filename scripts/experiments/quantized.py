"""The recipe `quantized`: what fewer bits of cached keys and values cost a trained model.

A small decoder learns to read Python (the standard library's source, byte by byte). Then held-out
text is read in pieces of 32 bytes, whose queries see the past as the cache returns it, and the
perplexity of all bytes behind the first 64 is compared. With run=RUN_OR_EXPORT a model that reads
bytes is examined as it was trained.
"""

import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.quantized import QuantizedKV
from models.micro_batch import MicroBatch
from models.span import Span
from scripts.experiments.eviction import fit, small_model
from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult
from trainer.decoding.open_model import open_model
from trainer.reports.markdown import markdown

LENGTH = 256
PIECE = 32
SKIPPED = 64
STEPS = 500
ROWS = 8
EXAM_ROWS = 24
RUN_ROWS = 4
LONGEST = 1024
SIZES = (
    "model=full",
    "model.layers=3",
    "model.width=96",
    "model.heads=3",
    "model.ffn=2.0",
    f"context_length={LENGTH}",
    f"batch_tokens={LENGTH}",
    "wandb.mode=disabled",
)
CACHES: dict[str, Callable[[], KVCacheFactory]] = {
    "as computed": Contiguous,
    "8 bits": lambda: QuantizedKV(8, 8, residual=PIECE),
    "4 bits": lambda: QuantizedKV(4, 4, residual=PIECE),
    "2 bits": lambda: QuantizedKV(2, 2, residual=PIECE),
    "2 bits, keys per token": lambda: QuantizedKV(2, 2, "token", residual=PIECE),
    "2 bits, keys before the rotation": lambda: QuantizedKV(
        2, 2, residual=PIECE, before_rotation=True
    ),
    "keys 8, values 4": lambda: QuantizedKV(8, 4, residual=PIECE),
    "keys 2, values 8": lambda: QuantizedKV(2, 8, residual=PIECE),
    "keys 8, values 2": lambda: QuantizedKV(8, 2, residual=PIECE),
}


def quantized(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what the recipe found, as markdown; one result a seed)."""
    if effort.run is not None:
        return _of_run(Path(effort.run), say), []
    train, held_out = texts()
    figures: dict[str, list[tuple[float, int]]] = {name: [] for name in CACHES}
    results = []
    for seed in effort.numbers():
        generator = torch.Generator().manual_seed(seed)
        model = small_model(SIZES, 256, seed)

        def batch(generator: torch.Generator = generator) -> tuple[Tensor, Tensor]:
            rows = crops(train, ROWS, LENGTH + 1, generator)
            return rows[:, :-1], rows[:, 1:]

        fit(model, batch, effort.steps or STEPS, 0.003, say)
        exam = crops(held_out, EXAM_ROWS, LENGTH + 1, torch.Generator().manual_seed(7))
        for name, make in CACHES.items():
            figures[name].append(perplexity(model, exam, make()))
            say(f"seed {seed}, {name}: perplexity {figures[name][-1][0]:.4f}")
        results.append(TrialResult("python", seed))
    words = (
        f"Perplexity per byte, float32 model of width 96 with 3 layers; rows of {LENGTH} bytes;"
        f" {effort.seeds} seeds."
    )
    return _report(figures, words, EXAM_ROWS), results


def _of_run(source: Path, say: Callable[[str], None]) -> str:
    """Returns what was found with a trained model."""
    opened = open_model(source)
    length = min(opened.config.context_length, LONGEST)
    # Drawn as ever, so that two runs read the same text.
    exam = crops(texts()[1], RUN_ROWS, length + 1, torch.Generator().manual_seed(7))
    figures: dict[str, list[tuple[float, int]]] = {}
    for name, make in CACHES.items():
        figures[name] = [perplexity(opened.model, exam, make())]
        say(f"{name}: perplexity {figures[name][0][0]:.4f}")
    count = sum(parameter.numel() for parameter in opened.model.parameters())
    words = (
        f"Perplexity per byte of a model of {count:,} parameters as its run left it; {RUN_ROWS}"
        f" rows of {length} bytes of the standard library's source."
    )
    return _report(figures, words, RUN_ROWS)


def _report(figures: dict[str, list[tuple[float, int]]], words: str, exam_rows: int) -> str:
    rows = [["cache", "perplexity", "bytes of a row", "of full precision"]]
    plain = figures["as computed"][0][1]
    for name, found in figures.items():
        mean = sum(each for each, _ in found) / len(found)
        held = found[0][1]
        rows.append([name, f"{mean:.4f}", f"{held // exam_rows:,}", f"{held / plain:.3f}"])
    introduction = (
        f"### Bits of cached keys and values\n{words} Groups of 32, the newest {PIECE} tokens in"
        " full precision. Scales are float32 too, as the model is."
    )
    return f"{introduction}\n\n{markdown(rows)}"


def texts() -> tuple[Tensor, Tensor]:
    """Returns the bytes of the standard library, to train on and held out, by whole files."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for number, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[number % 10 == 0].append(path.read_bytes())
    train, held_out = (torch.tensor(list(b"".join(files)), dtype=torch.long) for files in parts)
    return train, held_out


def crops(text: Tensor, rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Draws stretches of a text, [rows, length]."""
    starts = torch.randint(len(text) - length, (rows, 1), generator=generator)
    return text[starts + torch.arange(length)]


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, factory: KVCacheFactory) -> tuple[float, int]:
    """Returns (perplexity behind the first tokens, bytes of the cache at the end)."""
    factory.prepare(model)
    state = DecodingState(factory)
    total = 0.0
    count = 0
    for start in range(0, rows.shape[1] - 1, PIECE):
        tokens = rows[:, start : start + PIECE]
        pos = torch.arange(start, start + PIECE).expand_as(tokens)
        span = state.attach(Span.of(pos, torch.zeros_like(pos)))
        losses = model(MicroBatch(tokens, span, rows[:, start + 1 : start + PIECE + 1]))
        state.advance()
        if start >= SKIPPED:
            total += float(losses.double().sum())
            count += losses.numel()
    return math.exp(total / count), state.bytes()
