"""The recipe `sets`: attention over a set, and a sum over it.

Protocol: one learning rate and one number of steps for all models of a part, and about as many
parameters; figures are the accuracy on held-out sets.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from scripts.experiments.parts import Part, run_parts
from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult
from trainer.data.tasks.sets import Sets

SIZE = 10  # elements of the largest set, and tokens of a row: one set each
SYMBOLS = 32  # different elements; the more there are, the more sets it takes
COMMON = (
    "data=sets",
    "data.per_row=1",
    f"data.max_size={SIZE}",
    f"context_length={SIZE}",
    f"batch_tokens={256 * SIZE}",
    "optim.weight_decay=0",
    "optim.learning_rate=0.002",
    "evaluation.batches=4",
)
PAIRS = "Set Transformer, pairs"
SUM = "Deep Sets"
POINTS = "Set Transformer, 16 points"
MODELS = {
    PAIRS: ("model=set_transformer", "model.points=null"),
    # Wider, so that it has about as many parameters.
    SUM: ("model=deep_sets", "model.width=168"),
    POINTS: ("model=set_transformer", "model.points=16"),
}
COUNTING = Sets(task="distinct", min_size=SIZE, max_size=SIZE, symbols=SYMBOLS)
TASKS = {
    "distinct": COUNTING,
    "points": COUNTING,
    "characters": Sets(task="characters", min_size=6, max_size=SIZE),
}
DISTINCT = (
    *COMMON,
    "data.task=distinct",
    f"data.min_size={SIZE}",
    f"data.symbols={SYMBOLS}",
    "steps=600",
)
DIFFERENT = (
    f"### Different elements\nHow many different elements a set of {SIZE} has, of {SYMBOLS} that"
    " there are."
)
PARTS = {
    "distinct": Part(DISTINCT, DIFFERENT, (PAIRS, SUM)),
    "points": Part(DISTINCT, DIFFERENT, (POINTS,)),
    "characters": Part(
        (*COMMON, "data.task=characters", "data.min_size=6", "steps=2000"),
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
