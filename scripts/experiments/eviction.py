"""The recipe `eviction`: which caches still answer when most of the text is gone.

Multi-query associative recall: ten pairs of a key and a value, then only questions. Two keys of a
row are asked again and again, and no answer is ever in the text, so what is evicted cannot be read
again. A short convolution, then attention with rotary positions; trained on whole rows in which 1
to 10 keys are asked.

Two cuts: a stream, whose cache holds a quarter of the row at every step, and a prompt of the pairs
and eight questions, which is cut once.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.h2o import H2O
from models.cache.eviction.snapkv import SnapKV
from models.cache.eviction.streaming import Streaming
from models.cache.eviction.tova import Tova
from models.cache.eviction.window import Window
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult
from trainer.config.build_model import build_model
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting
from trainer.reports.markdown import markdown

KEYS = 32
VALUES = 32
VOCABULARY = 1 + KEYS + VALUES
PAIRS = 10
HOT = 2
LENGTH = 64
PROMPT = 28
STEPS = 400
ROWS = 64
EXAM_ROWS = 128
STREAM = (16, 24)
CUTS = (8, 10, 14)

SIZES = (
    "model=full",
    "model.mixers.short_conv._target_=models.convolution.short_conv.ShortConv",
    "model.pattern=[short_conv,full]",
    "model.layers=2",
    "model.width=64",
    "model.heads=1",
    "model.ffn=0.5",
    "model.init_std=0.1",
    f"context_length={LENGTH}",
    f"batch_tokens={LENGTH}",
    "wandb.mode=disabled",
)
INTRODUCTION = """\
### Eviction
Share of right answers to questions behind the first {prompt} tokens; {pairs} pairs, {hot} keys \
asked, rows of {length} tokens; means of {seeds} seeds."""

STREAMED: Mapping[str, Callable[[int], KVCacheFactory]] = {
    "window": Window,
    "streaming": lambda budget: Streaming(budget, 4),
    "tova": Tova,
    "h2o": H2O,
}
CUT_ONCE: Mapping[str, Callable[[int], KVCacheFactory]] = {
    "window": Window,
    "h2o": H2O,
    "snapkv": lambda budget: SnapKV(budget, 6, 1),
}


def eviction(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what was found, as markdown; one result a seed, with a fault where a claim failed)."""
    scores: dict[tuple[str, str, int], list[float]] = {}
    results = []
    for seed in effort.numbers():
        model = trained(seed, effort.steps or STEPS, say)
        result = TrialResult("recall", seed)
        found = examined(model, seed)
        for name, accuracy in found.items():
            scores.setdefault(name, []).append(accuracy)
        if effort.steps is None:
            result.fault = broken_claims(found)
        results.append(result)
        for (cut, cache, budget), share in found.items():
            say(f"seed {seed}, {cut}, {cache}, {budget} tokens: {share:.3f}")
    means = {name: sum(each) / len(each) for name, each in scores.items()}
    introduction = INTRODUCTION.format(
        prompt=PROMPT, pairs=PAIRS, hot=HOT, length=LENGTH, seeds=effort.seeds
    )
    tables = [introduction, f"All tokens held: {means['all', 'contiguous', LENGTH]:.3f}."]
    tables.append(_table(means, "stream", STREAM, f"tokens held of {LENGTH}"))
    tables.append(_table(means, "prompt", CUTS, f"tokens held of a prompt of {PROMPT}"))
    return "\n\n".join(tables), results


def broken_claims(found: Mapping[tuple[str, str, int], float]) -> str | None:
    """Returns the claims that did not hold, or None."""
    claims = {
        "h2o >= 0.8 at a quarter": found["stream", "h2o", LENGTH // 4] >= 0.8,
        "window < 0.2 at a quarter": found["stream", "window", LENGTH // 4] < 0.2,
        "snapkv >= 0.9 at a third of the prompt": found["prompt", "snapkv", 10] >= 0.9,
    }
    broken = [claim for claim, holds in claims.items() if not holds]
    return f"does not hold: {'; '.join(broken)}" if broken else None


def rows_of(rows: int, hot: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws (tokens, targets), both [rows, LENGTH].

    Args:
        hot: least and most keys of a row that are asked.
    """
    asked = LENGTH - 2 * PAIRS
    keys = torch.rand(rows, KEYS, generator=generator).argsort(1)[:, :PAIRS] + 1
    values = torch.randint(VALUES, (rows, PAIRS), generator=generator) + 1 + KEYS
    count = torch.randint(hot[0], hot[1] + 1, (rows, 1), generator=generator)
    # pairs come in random order, so the first `count` of them are any
    order = torch.rand(rows, PAIRS, generator=generator).argsort(1)
    number = (torch.rand(rows, asked, generator=generator) * count).long()
    pair = order.gather(1, number)
    tokens = torch.zeros(rows, LENGTH, dtype=torch.long)
    targets = torch.full_like(tokens, IGNORE)
    tokens[:, 0 : 2 * PAIRS : 2] = keys
    tokens[:, 1 : 2 * PAIRS : 2] = values
    tokens[:, 2 * PAIRS :] = keys.gather(1, pair)
    targets[:, 2 * PAIRS :] = values.gather(1, pair)
    return tokens, targets


def small_model(overrides: tuple[str, ...], vocabulary: int, seed: int) -> nn.Module:
    """Builds a model from settings, with initial weights."""
    config = load_config(fitting([*overrides, f"seed={seed}"]))
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    return initialise(model.to_empty(device="cpu"), seed)


def fit(
    model: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    steps: int,
    learning_rate: float,
    say: Callable[[str], None],
) -> None:
    """Trains on (tokens, targets) [B, T] of single documents; the rate falls to zero."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    model.train()
    for step in range(steps):
        warm = min(1.0, (step + 1) / 20)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * warm * (1 - step / steps)
        tokens, targets = batch()
        losses = model(MicroBatch(tokens, Span.line(*tokens.shape), targets))
        loss = losses.sum() / (targets != IGNORE).sum()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        if step % 100 == 99:
            say(f"step {step + 1}/{steps}  loss {loss.item():.4f}")
    model.eval()


def trained(seed: int, steps: int, say: Callable[[str], None]) -> nn.Module:
    """Returns a model that answers questions."""
    model = small_model(SIZES, VOCABULARY, seed)
    generator = torch.Generator().manual_seed(seed)
    fit(model, lambda: rows_of(ROWS, (1, PAIRS), generator), steps, 0.003, say)
    return model


def examined(model: nn.Module, seed: int) -> dict[tuple[str, str, int], float]:
    """Returns the share of right answers by (kind of cut, cache, budget)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tokens, targets = rows_of(EXAM_ROWS, (HOT, HOT), generator)
    found = {("all", "contiguous", LENGTH): accuracy(model, tokens, targets, Contiguous())}
    for name, factory in STREAMED.items():
        for budget in STREAM:
            found["stream", name, budget] = accuracy(model, tokens, targets, factory(budget))
    for name, factory in CUT_ONCE.items():
        for budget in CUTS:
            found["prompt", name, budget] = accuracy(
                model, tokens, targets, factory(budget), cut_once=True
            )
    return found


@torch.no_grad()
def accuracy(
    model: nn.Module,
    tokens: Tensor,
    targets: Tensor,
    factory: KVCacheFactory,
    *,
    cut_once: bool = False,
) -> float:
    """Reads the prompt in one piece and the rest token by token.

    Args:
        cut_once: every question behind the prompt is asked of the cache that the prompt left: the
            tokens that come later take no room from it.
    """
    factory.prepare(model)
    state = DecodingState(factory)
    right = 0
    _feed(model, state, tokens[:, :PROMPT], 0)
    left = state.export_state() if cut_once else {}
    for place in range(PROMPT, LENGTH):
        if cut_once:
            state = DecodingState(factory)
            state.import_state(left)
        # a question asked of the prompt alone follows it directly
        begin = PROMPT if cut_once else place
        logits = _feed(model, state, tokens[:, place : place + 1], begin)
        right += int((logits[:, -1].argmax(-1) == targets[:, place]).sum())
    return right / (len(tokens) * (LENGTH - PROMPT))


def _feed(model: nn.Module, state: DecodingState, tokens: Tensor, begin: int) -> Tensor:
    """Returns the logits [B, T, V] of a piece that begins at a position of its documents."""
    pos = torch.arange(begin, begin + tokens.shape[1]).expand_as(tokens)
    logits = model(MicroBatch(tokens, state.attach(Span.of(pos, torch.zeros_like(pos)))))
    state.advance()
    return logits


def _table(
    means: Mapping[tuple[str, str, int], float], kind: str, budgets: tuple[int, ...], words: str
) -> str:
    rows = [["cache", *[f"{budget} {words}" for budget in budgets]]]
    for name in dict.fromkeys(cache for cut, cache, _ in means if cut == kind):
        rows.append([name, *[f"{means[kind, name, budget]:.3f}" for budget in budgets]])
    return markdown(rows)
