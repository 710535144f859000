"""The recipe `memory`: what a memory is good for, each kind on a task that its rival cannot do.

Protocol: one learning rate for all models of a part, and a fixed number of steps; figures are of
held-out data. A rival has the same sizes, or as many parameters, as the table says; the LSTM that
copies gets twice the steps of the Turing machine.
"""

import math
from collections.abc import Callable, Mapping

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import TableColumn, table
from scripts.experiments.trial import Trial, TrialResult

NONE = "memory=none"

# Text: rows of 32 bytes, in lanes where there is a memory.
SMALL = (
    "model.width=96",
    "model.layers=3",
    "model.heads=4",
    "model.ffn=2.0",
    "optim.weight_decay=0.01",
)
READING = (
    "model=full",
    *SMALL,
    "position=relative",
    "data=stdlib",
    "context_length=32",
    "batch_tokens=512",
)
READING += ("steps=800", "optim.learning_rate=0.003", "evaluation.batches=60")
RECALLED = ("memory=segments", "memory.length=64")
TEXT = (
    Trial("rows of 32 bytes", READING),
    Trial(
        "and 64 bytes recalled",
        (*READING, *RECALLED),
        {"off": (NONE, "memory.length=0"), "128": ("memory.length=128",)},
    ),
)

# Retrieval: pairs in one segment, questions in another; trained within one and with 0 or 1 between,
# asked with up to 6.
SEGMENT = 16
PAIRS = 4
AWAY = (0, 1, 3, 6)
ASKING = (
    "model.width=64",
    "model.layers=2",
    "model.heads=1",
    "model.ffn=2.0",
    "optim.weight_decay=0.01",
)
ASKING += (
    "model.mixers.short_conv._target_=models.convolution.short_conv.ShortConv",
    "data=retrieval",
    "data.per_row=1",
    "data.min_distance=-1",
)
ASKING += (
    f"data.segment={SEGMENT}",
    f"data.pairs={PAIRS}",
    "data.keys=16",
    "data.values=16",
    "data.fillers=1",
)
ASKING += ("position=none", "model.init_std=0.1", "steps=800", "optim.learning_rate=0.003")
BOTH = (
    "model=full",
    "model.pattern=[short_conv,full]",
)  # so that a value is kept with the key before it
REMEMBERING = {  # name in the table -> settings
    "window alone": (
        "model=chunked",
        "model.pattern=[short_conv,chunked]",
        f"model.mixers.chunked.size={SEGMENT}",
    ),
    "recurrent memory (8 tokens)": (
        *BOTH,
        "memory=tokens",
        "memory.length=8",
        "model.heads=2",
        "position=rope",
        "steps=1200",
    ),
    "Memorizing (16 of 512 found)": (
        *BOTH,
        "memory=lookup",
        "memory.length=512",
        "memory.count=16",
    ),
    "Infini, linear": (*BOTH, "memory=compressive", "memory.rule=linear"),
    "Infini, delta": (*BOTH, "memory=compressive", "memory.rule=delta"),
}

# Copying: one example a row; an LSTM as large as the Turing machine, given more steps.
TURING = ("model=ntm",)
LSTM = ("model=lstm", "model.width=52")
COPYING = ("data=copy", "data.per_row=1", "optim.max_grad_norm=10", "optim.weight_decay=0")
TO_10 = "data.max_length=10"
TO_20 = "data.max_length=20"
STEPS = "steps=1000"
BEYOND = (10, 20, 30, 60, 120)

# Facts: the same network, keys and values apart or one.
FACTS = (
    "model=key_value",
    "model.width=64",
    "data=facts",
    "context_length=84",
    "batch_tokens=2688",
)
FACTS += ("steps=200", "optim.learning_rate=0.01", "optim.weight_decay=0")


def memory(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what the recipe found, as markdown; every lesson)."""
    every = {"text": TEXT, "retrieval": _retrieval(), "copying": _copying(), "facts": _facts()}
    parts = {name: lessons for name, lessons in every.items() if effort.only in (None, name)}
    jobs = [
        (lesson, seed)
        for lessons in parts.values()
        for lesson in lessons
        for seed in effort.numbers()
    ]
    learned = run_trials(jobs, effort, say)
    told = []
    for part, lessons in parts.items():
        words, columns, digits = SHOWN[part]
        names = {lesson.name for lesson in lessons}
        told += [
            words,
            table([each for each in learned if each.name in names], columns, digits=digits),
        ]
    return "\n\n".join(told), learned


def _retrieval() -> list[Trial]:
    exams = {
        f"{n} between": (
            *_rows(64, (n + 1) * SEGMENT + PAIRS),
            f"data.min_distance={n}",
            f"data.max_distance={n}",
        )
        for n in AWAY
    }
    common = (*ASKING, *_rows(32, 2 * SEGMENT + PAIRS))
    return [
        Trial(
            name,
            (
                *common,
                *words,
                *(
                    [f"memory.segment={SEGMENT}"]
                    if any(word.startswith("memory=") for word in words)
                    else []
                ),
            ),
            exams,
        )
        for name, words in REMEMBERING.items()
    ]


def _copying() -> list[Trial]:
    exams = {
        f"{n}": (
            *_rows(32, 2 * n + 1),
            f"data.min_length={n}",
            f"data.max_length={n}",
            "evaluation.batches=2",
        )
        for n in BEYOND
    }
    short = (*COPYING, TO_10, *_rows(32, 21))
    long = (*COPYING, TO_20, *_rows(32, 41))
    return [
        Trial("NTM, trained to 10", (*TURING, *short, STEPS, "optim.learning_rate=0.005"), exams),
        Trial(
            "LSTM, trained to 10", (*LSTM, *short, "steps=2000", "optim.learning_rate=0.005"), exams
        ),
        Trial("NTM, trained to 20", (*TURING, *long, STEPS, "optim.learning_rate=0.005"), exams),
    ]


def _facts() -> list[Trial]:
    return [Trial("key and value", FACTS), Trial("key = value", (*FACTS, "model.shared=true"))]


def _rows(rows: int, length: int) -> tuple[str, str]:
    return f"context_length={length}", f"batch_tokens={rows * length}"


def _bits(exam: str | None = None) -> Callable[[TrialResult], float]:
    """Bits per byte in an exam, or as trained; NaN where the lesson has no such exam."""

    def figure(learned: TrialResult) -> float:
        if exam is None:
            return learned.loss / math.log(2)
        return learned.loss_of(exam) / math.log(2) if exam in learned.exams else math.nan

    return figure


def _grade(name: str, exam: str) -> Callable[[TrialResult], float]:
    return lambda learned: learned.exams[exam].graded[name]


def _parameters(learned: TrialResult) -> str:
    return f"{learned.parameters:,}"


SHOWN: dict[
    str, tuple[str, Mapping[str, TableColumn], int]
] = {  # part -> (what is shown, its columns, digits behind the point)
    "text": (
        (
            "### Real text: Transformer-XL\nBits per byte of held-out source code (the standard"
            " library), width 96, 3 layers."
        ),
        {"as trained": _bits(), "memory off": _bits("off"), "128 recalled": _bits("128")},
        3,
    ),
    "retrieval": (
        (
            f"### Retrieval beyond the window\nHeld-out accuracy at {PAIRS} keys asked so many"
            f" segments of {SEGMENT} tokens after their values were shown; chance 1/16, or 1/4"
            " for who knows which values were shown. A short convolution, then attention,"
            " width 64; trained within a segment, and with 0 and 1 between. Recurrent memory"
            " has two heads and half as many steps again."
        ),
        {f"{n} between": _grade("accuracy", f"{n} between") for n in AWAY},
        3,
    ),
    "copying": (
        (
            "### Copying\nShare of wrong bits in copies of so many random vectors of 8 bits"
            " (chance 0.5)."
        ),
        {f"{n}": _grade("wrong_bits", f"{n}") for n in BEYOND} | {"parameters": _parameters},
        4,
    ),
    "facts": (
        (
            "### Facts\nHeld-out accuracy of who follows whom, two reads; a guess between both"
            " neighbours is right half the time."
        ),
        {"accuracy": lambda each: each.accuracy, "parameters": _parameters},
        3,
    ),
}
