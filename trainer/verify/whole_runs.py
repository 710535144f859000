"""Compares whole runs: the loss of every step is the same on any number of ranks.

A case is a set of overrides; the first case of a plan is the reference. `scripts/agree.py` prints
the table, and a test requires it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.logs.jsonl import METRICS, read

STEPS = 30
LENGTH = 510  # tokens in a row: does not divide among 4 ranks in any layout
DOCUMENTS = 60

WORDS = "the cat sat on a mat and thought of nothing at all while rain fell over the town"

Case = tuple[str, ...]
StartRun = Callable[[Sequence[str], int, Path], None]

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
    "log.plots=false",
)

REFERENCE: Case = ("parallel.context=1", "engine=single")


def _method_cases() -> tuple[Case, ...]:
    """Returns the reference and cases of both methods, both layouts and both engines."""
    cases: list[Case] = [REFERENCE]
    for context in (2, 3, 4):
        for layout in ("zigzag", "contiguous"):
            for engine in ("single", "fsdp"):
                cases.append(_case("ring", context, layout, engine))
    # Ulysses divides the heads, so that 3 ranks cannot share 4 of them.
    for context in (2, 4):
        for layout in ("zigzag", "contiguous"):
            cases.append(_case("ulysses", context, layout, "fsdp"))
    cases += [
        ("parallel.context=2", "parallel.data=2", "engine=fsdp", "parallel.micro_batch=1"),
        ("parallel.context=2", "parallel.data=2", "engine=single", "parallel.method=ulysses"),
        ("parallel.context=1", "parallel.data=3", "engine=fsdp"),
    ]
    return tuple(cases)


def _case(method: str, context: int, layout: str, engine: str) -> Case:
    return (
        f"parallel.context={context}",
        f"parallel.method={method}",
        f"parallel.layout={layout}",
        f"engine={engine}",
    )


def _engine_cases() -> tuple[Case, ...]:
    """Returns the reference and every engine x ranks x context x accumulation.

    With accumulation a forward pass takes one row, and a step has several.
    """
    engines: list[Case] = []
    for stage in range(4):
        engines.append(("engine=deepspeed", f"engine.zero_stage={stage}"))
    engines.append(("engine=fsdp",))
    engines.append(("engine=single",))
    cases: list[Case] = [REFERENCE]
    for size in (2, 4):
        for context in (1, 2):
            for micro_batch in ("auto", "1"):
                parallel = (
                    f"parallel.context={context}",
                    f"parallel.data={size // context}",
                    f"parallel.micro_batch={micro_batch}",
                )
                for engine in engines:
                    cases.append((*engine, *parallel))
                # Replicas of shards need at least two ranks in each direction.
                if size == 4:
                    cases.append(("engine=fsdp", "engine.replicate=2", *parallel))
    return tuple(cases)


class ComparisonPlan(NamedTuple):
    """A table of runs that must agree.

    Attributes:
        settings: overrides that all runs share.
        steps: length of a run.
        cases: overrides of each run; the first is the reference.
        columns: of metrics.jsonl, that must agree.
        tolerance: largest relative difference at any step.
    """

    settings: tuple[str, ...]
    steps: int
    cases: tuple[Case, ...]
    columns: tuple[str, ...]
    tolerance: float


# 4 ranks do not divide a row, nor data ranks the rows: some rows are padding.
ROW = 250
ROWS = 5
LONG = 50
QUICKSTART = (
    "experiment=quickstart",
    "precision=float32",
    f"context_length={ROW}",
    f"batch_tokens={ROWS * ROW}",
    "model.layers=2",
    # At 0.002 the last bits of float32 grow a thousandfold in 50 steps of this data.
    "optim.learning_rate=0.0005",
    "parallel.method=auto",
    "checkpoint.every=0",
    "evaluation.every=0",
    "evaluation.sample_tokens=0",
    "wandb.mode=disabled",
    "log.plots=false",
)

CASES = _method_cases()
PLANS = {
    "float32": ComparisonPlan((*COMMON, "precision=float32"), STEPS, CASES, ("loss",), 1e-4),
    "float64": ComparisonPlan((*COMMON, "precision=float64"), STEPS, CASES, ("loss",), 1e-9),
    "engines": ComparisonPlan(QUICKSTART, LONG, _engine_cases(), ("loss", "grad_norm"), 1e-4),
}


def ranks_of(case: Sequence[str]) -> int:
    """Returns the number of ranks that a case takes."""
    settings = dict(word.split("=") for word in case)
    context = int(settings.get("parallel.context", 1))
    data = int(settings.get("parallel.data", 1))
    return context * data


def figures(directory: Path, columns: Sequence[str]) -> list[list[float]]:
    """Returns the columns of every step of a run."""
    steps = []
    for row in read(directory / METRICS):
        steps.append([row[column] for column in columns])
    return steps


def worst(
    reference: Sequence[Sequence[float]], other: Sequence[Sequence[float]], steps: int
) -> float:
    """Returns the largest relative difference of any step and column.

    Infinite when a step is missing in either run.
    """
    if len(reference) != steps or len(other) != steps:
        return float("inf")
    differences = []
    for expected_row, row in zip(reference, other):
        for expected, value in zip(expected_row, row, strict=True):
            differences.append(abs(expected - value) / abs(expected))
    return max(differences)


def write_documents(folder: Path) -> str:
    """Writes text files of very uneven length, one of them a single letter; returns their glob.

    A row of a small model holds several of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS.split()
    for number in range(DOCUMENTS):
        count = 1 + (number * number * 7) % 180
        # Strides differ from file to file, so that no two files are equal.
        stride = 1 + number % 3
        chosen = [words[(number * 5 + index * stride) % len(words)] for index in range(count)]
        text = " ".join(chosen) if number else "x"
        (folder / f"{number:02d}.txt").write_text(text)
    return str(folder / "*.txt")


def compare(
    run: StartRun,
    folder: Path,
    name: str,
    *,
    cases: Sequence[Sequence[str]] | None = None,
    steps: int | None = None,
) -> list[tuple[str, float]]:
    """Runs every case of a plan and compares it with the reference.

    Args:
        run: starts (overrides, ranks, run directory) and waits for its end.
        folder: receives the data and the runs.
        name: of the plan.
        cases: replaces those of the plan; the first is the reference.
        steps: replaces that of the plan.

    Returns:
        Each case with its largest relative difference.
    """
    plan = PLANS[name]
    length = steps or plan.steps
    data = (
        "data=files",
        f"data.path={write_documents(folder / 'text')}",
        f"data.cache={folder / 'cache'}",
    )
    errors = []
    reference: list[list[float]] = []
    for number, case in enumerate(cases or plan.cases):
        directory = folder / name / f"{number:02d}"
        overrides = (*plan.settings, *data, *case, f"steps={length}", f"run_dir={directory}")
        run(overrides, ranks_of(case), directory)
        values = figures(directory, plan.columns)
        if not reference:
            reference = values
        errors.append((" ".join(case), worst(reference, values, length)))
    return errors
