"""The recipe `sets`: attention over a set, and a sum over it.

Protocol: one learning rate and one number of steps for all models of a part, of equal width or
about as many parameters; figures are the accuracy on held-out sets.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scripts.experiments.parts import ExperimentPart, run_parts
from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult
from trainer.data.tasks.sets import Sets

SIZE = 12  # elements of a set whose different elements are counted
SYMBOLS = 64  # different elements; the more there are, the more sets it takes
LETTERS = 10  # elements of the largest set of letters
COMMON = (
    "data=sets",
    "data.per_row=1",
    "optim.weight_decay=0",
    "optim.learning_rate=0.002",
    "evaluation.batches=4",
)
PAIRS = "Set Transformer, pairs"
SUM = "Deep Sets"
WIDE_SUM = "Deep Sets, as many parameters"
POINTS = "Set Transformer, 16 points"
MODELS = {
    PAIRS: ("model=set_transformer", "model.points=null"),
    # As wide as the others: a sum over 64 symbols in 64 channels.
    SUM: ("model=deep_sets",),
    # Wide enough to have a channel for each symbol.
    WIDE_SUM: ("model=deep_sets", "model.width=168"),
    POINTS: ("model=set_transformer", "model.points=16"),
}
COUNTING = Sets(task="distinct", min_size=SIZE, max_size=SIZE, symbols=SYMBOLS)
TASKS = {
    "distinct": COUNTING,
    "points": COUNTING,
    "characters": Sets(task="characters", min_size=6, max_size=LETTERS),
}


def _rows_of(size: int) -> tuple[str, ...]:
    """Returns the settings of rows of one set each, of that many elements at most."""
    return f"data.max_size={size}", f"context_length={size}", f"batch_tokens={256 * size}"


DISTINCT = (
    *COMMON,
    *_rows_of(SIZE),
    "data.task=distinct",
    f"data.min_size={SIZE}",
    f"data.symbols={SYMBOLS}",
    "steps=1500",
)
DIFFERENT = (
    f"### Different elements\nHow many different elements a set of {SIZE} has, of {SYMBOLS} that"
    " there are."
)
PARTS = {
    "distinct": ExperimentPart(DISTINCT, DIFFERENT, (PAIRS, SUM, WIDE_SUM)),
    "points": ExperimentPart(DISTINCT, DIFFERENT, (POINTS,)),
    "characters": ExperimentPart(
        (
            *COMMON,
            *_rows_of(LETTERS),
            "data.task=characters",
            "data.min_size=6",
            "steps=2000",
        ),
        "### Different letters\nHow many different letters there are among 6 to 10 Latin"
        " characters of either case, with accents and without.",
    ),
}


def sets(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial)."""
    parts = {}
    for name, part in PARTS.items():
        share = majority(TASKS[name])
        words = f"{part.text} The commonest answer is right {share:.3f} of the time."
        parts[name] = replace(part, text=words)
    return run_parts(MODELS, parts, effort, say)


def majority(task: Sets, examples: int = 20_000) -> float:
    """Returns the share of the commonest answer among that many sets."""
    random = np.random.default_rng(0)
    answers = [task.answer(task.example(random).tokens) for _ in range(examples)]
    return float(np.bincount(answers).max()) / examples
