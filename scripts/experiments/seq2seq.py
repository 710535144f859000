"""The recipe `seq2seq`: what attention is for in an encoder-decoder, and how far it reaches.

Protocol: a source of 4 to 16 symbols is to be said from its end; one learning rate, batch and
number of steps for all; then answers are written freely from held-out sources of one length each,
up to twice the longest that was trained.
"""

from collections.abc import Callable

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import table
from scripts.experiments.trial import Trial, TrialResult

LENGTHS = (8, 16, 24, 32)
COMMON = (
    "data=reverse",
    "data.min_length=4",
    "data.max_length=16",
    "data.symbols=16",
    "data.per_row=1",
    "context_length=17",
    "batch_tokens=1088",  # 64 pairs, one a row
    "steps=800",
    "model.width=64",
    "model.layers=1",
    "optim.learning_rate=0.003",
    "optim.weight_decay=0.0",
    "schedule.warmup_steps=50",
    "evaluation.batches=4",
)
KINDS = {  # name in the table -> settings
    "no attention": ("model=seq2seq", "model.attention=none"),
    "bahdanau": ("model=seq2seq", "model.attention=bahdanau"),
    "luong_dot": ("model=seq2seq", "model.attention=luong_dot"),
    "luong_general": ("model=seq2seq", "model.attention=luong_general"),
    "luong_concat": ("model=seq2seq", "model.attention=luong_concat"),
    "local_p, window 3": (
        "model=seq2seq",
        "model.attention=local_p",
        "model.window=3",
    ),
    "Transformer": (
        "model=encoder_decoder",
        "model.heads=4",
        "model.ffn=2.0",
        "model.layers=2",
        "model.init_std=0.1",
    ),
}
INTRODUCTION = """\
### Reversing beyond the trained length
Share of right tokens, written freely (greedy), from held-out sources of one length; trained on 4\
 to 16 symbols of 16 kinds, chance 1/16. GRU of width 64 on both sides, or two layers of a\
 Transformer with rotary positions."""


def seq2seq(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what the recipe found, as markdown; every lesson)."""
    exams = {str(length): _of_length(length) for length in LENGTHS}
    trials = [Trial(name, (*words, *COMMON), exams) for name, words in KINDS.items()]
    learned = run_trials(
        [(trial, seed) for trial in trials for seed in effort.numbers()], effort, say
    )
    columns = {}
    for length in LENGTHS:
        columns[f"{length} symbols"] = _share_of(str(length))
    columns["parameters"] = _parameters
    return "\n\n".join([INTRODUCTION, table(learned, columns)]), learned


def _of_length(length: int) -> tuple[str, ...]:
    """Returns the settings of an exam on sources of one length."""
    return (
        f"data.min_length={length}",
        f"data.max_length={length}",
        f"context_length={length + 1}",
        f"batch_tokens={64 * (length + 1)}",
    )


def _share_of(exam: str) -> Callable[[TrialResult], float]:
    return lambda learned: learned.exams[exam].graded["token_accuracy"]


def _parameters(learned: TrialResult) -> str:
    return f"{learned.parameters:,}"
