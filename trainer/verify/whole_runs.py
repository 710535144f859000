"""The promise, on whole runs: every step's loss is the same however the sequence, the rows and the
parameters are spread.

A case is a set of overrides; the first is the truth. `scripts/agree.py` prints the table, a test
holds it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.logs.jsonl import METRICS, read

STEPS = 30
LENGTH = 510  # tokens in a row: divides among 4 ranks in no layout

WORDS = "the cat sat on a mat and thought of nothing at all while rain fell over the town"

COMMON = (
    f"context_length={LENGTH}",
    f"batch_tokens={4 * LENGTH}",
    "model.width=32",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    "optim.learning_rate=0.003",
    "schedule.warmup_steps=5",
    "checkpoint.every=0",
    "evaluation.every=0",
    "wandb.mode=disabled",
)


def _ring(context: int, layout: str, engine: str) -> tuple[str, ...]:
    return (
        f"parallel.context={context}",
        "parallel.method=ring",
        f"parallel.layout={layout}",
        f"engine={engine}",
    )


def _heads(context: int, layout: str) -> tuple[str, ...]:
    return (
        f"parallel.context={context}",
        "parallel.method=ulysses",
        f"parallel.layout={layout}",
        "engine=fsdp",
    )


TRUTH = ("parallel.context=1", "engine=single")

CASES: tuple[tuple[str, ...], ...] = (
    TRUTH,
    *(
        _ring(n, layout, engine)
        for n in (2, 3, 4)
        for layout in ("zigzag", "contiguous")
        for engine in ("single", "fsdp")
    ),
    *(_heads(n, layout) for n in (2, 4) for layout in ("zigzag", "contiguous")),
    ("parallel.context=2", "parallel.data=2", "engine=fsdp", "parallel.micro_batch=1"),
    ("parallel.context=2", "parallel.data=2", "engine=single", "parallel.method=ulysses"),
    ("parallel.context=1", "parallel.data=3", "engine=fsdp"),
)


def _engines() -> tuple[tuple[str, ...], ...]:
    """Every engine x ranks x context x accumulation; accumulated, each forward pass takes a row and
    a step has several."""
    kinds = (
        *(("engine=deepspeed", f"engine.zero_stage={stage}") for stage in range(4)),
        ("engine=fsdp",),
        ("engine=single",),
    )
    cases = []
    for size in (2, 4):
        for context in (1, 2):
            for rows in ("auto", "1"):
                spread = (
                    f"parallel.context={context}",
                    f"parallel.data={size // context}",
                    f"parallel.micro_batch={rows}",
                )
                cases += [(*kind, *spread) for kind in kinds]
                if size == 4:
                    cases.append(("engine=fsdp", "engine.replicate=2", *spread))
    return (TRUTH, *cases)


class ComparisonPlan(NamedTuple):
    """A table of runs that must agree.

    Attributes:
        settings: what all runs share. steps: how many they have.
        cases: overrides of each; the first is the truth.
        columns: of metrics.jsonl, what must agree.
        tolerance: largest relative difference at any step.
    """

    settings: tuple[str, ...]
    steps: int
    cases: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    tolerance: float


# 4 ranks divide no row, and no data ranks the rows: some rows are of padding
ROW = 250
ROWS = 5
LONG = 50
QUICKSTART = (
    "experiment=quickstart",
    "precision=float32",
    f"context_length={ROW}",
    f"batch_tokens={ROWS * ROW}",
    "model.layers=2",
    # at 0.002 the last bits of float32 grow a thousandfold in 50 steps of this data
    "optim.learning_rate=0.0005",
    "parallel.method=auto",
    "checkpoint.every=0",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "wandb.mode=disabled",
)

PLANS = {
    "float32": ComparisonPlan((*COMMON, "precision=float32"), STEPS, CASES, ("loss",), 1e-4),
    "float64": ComparisonPlan((*COMMON, "precision=float64"), STEPS, CASES, ("loss",), 1e-9),
    "engines": ComparisonPlan(QUICKSTART, LONG, _engines(), ("loss", "grad_norm"), 1e-4),
}


def ranks_of(case: Sequence[str]) -> int:
    """How many ranks a case takes."""
    sizes = dict(word.split("=") for word in case)
    return int(sizes.get("parallel.context", 1)) * int(sizes.get("parallel.data", 1))


def figures(directory: Path, columns: Sequence[str]) -> list[list[float]]:
    """The columns of every step of a run."""
    return [[row[column] for column in columns] for row in read(directory / METRICS)]


def worst(truth: Sequence[Sequence[float]], other: Sequence[Sequence[float]], steps: int) -> float:
    """Largest relative difference over steps and columns; infinite where a step is missing."""
    if len(truth) != steps or len(other) != steps:
        return float("inf")
    return max(
        abs(a - b) / abs(a) for one, two in zip(truth, other) for a, b in zip(one, two, strict=True)
    )


def write_documents(folder: Path) -> str:
    """Text files of very uneven length, one of a single letter, that many rows hold several of; the
    glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS.split()
    for number in range(60):
        count = 1 + (number * number * 7) % 180
        text = " ".join(
            words[(number * 5 + i * (1 + number % 3)) % len(words)] for i in range(count)
        )
        (folder / f"{number:02d}.txt").write_text(text if number else "x")
    return str(folder / "*.txt")


def compare(
    run: Callable[[Sequence[str], int, Path], None],
    folder: Path,
    name: str,
    *,
    cases: Sequence[Sequence[str]] | None = None,
    steps: int | None = None,
) -> list[tuple[str, float]]:
    """Run every case of a plan and set it against the truth's: (case, largest relative difference).

    Args:
        run: starts (overrides, ranks, run directory) and waits for its end.
        folder: for the data and the runs.
        name: of the plan. cases, steps: others than its own; the first case is the truth.
    """
    length = steps or PLANS[name].steps
    data = (
        "data=files",
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
    )
    plan = PLANS[name]
    found = []
    truth: list[list[float]] = []
    for number, case in enumerate(cases or plan.cases):
        directory = folder / name / f"{number:02d}"
        run(
            (*plan.settings, *data, *case, f"steps={length}", f"run_dir={directory}"),
            ranks_of(case),
            directory,
        )
        got = figures(directory, plan.columns)
        truth = truth or got
        found.append((" ".join(case), worst(truth, got, length)))
    return found
