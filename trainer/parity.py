"""The promise, on whole runs: every step's loss is the same however the sequence, the rows and the parameters are spread.

A case is a set of overrides; the first is the truth. `scripts/parity.py` prints the table, a test holds it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.logs.jsonl import METRICS, read

STEPS = 30
LENGTH = 510  # tokens in a row: divides among 4 ranks in no layout

WORDS = "the cat sat on a mat and thought of nothing at all while rain fell over the town"

TOLERANCES = {"float32": 1e-4, "float64": 1e-9}  # largest relative difference of any step's loss

COMMON = (
    f"steps={STEPS}",
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
    return (f"parallel.context={context}", "parallel.method=ring", f"parallel.layout={layout}", f"engine={engine}")


def _heads(context: int, layout: str) -> tuple[str, ...]:
    return (f"parallel.context={context}", "parallel.method=heads", f"parallel.layout={layout}", "engine=fsdp")


TRUTH = ("parallel.context=1", "engine=single")

CASES: tuple[tuple[str, ...], ...] = (
    TRUTH,
    *(_ring(n, layout, engine) for n in (2, 3, 4) for layout in ("zigzag", "contiguous") for engine in ("single", "fsdp")),
    *(_heads(n, layout) for n in (2, 4) for layout in ("zigzag", "contiguous")),
    ("parallel.context=2", "parallel.data=2", "engine=fsdp", "parallel.micro_batch=1"),
    ("parallel.context=2", "parallel.data=2", "engine=single", "parallel.method=heads"),
    ("parallel.context=1", "parallel.data=3", "engine=fsdp"),
)


def ranks_of(case: Sequence[str]) -> int:
    """How many ranks a case takes."""
    sizes = dict(word.split("=") for word in case)
    return int(sizes.get("parallel.context", 1)) * int(sizes.get("parallel.data", 1))


def losses(directory: Path) -> list[float]:
    """The loss of every step of a run."""
    return [row["loss"] for row in read(directory / METRICS)]


def worst(truth: Sequence[float], other: Sequence[float]) -> float:
    """Largest relative difference over the steps; infinite where a step is missing."""
    if len(truth) != STEPS or len(other) != STEPS:
        return float("inf")
    return max(abs(a - b) / abs(a) for a, b in zip(truth, other))


def write_documents(folder: Path) -> str:
    """Text files of very uneven length, one of a single letter, that many rows hold several of; the glob of them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = WORDS.split()
    for number in range(60):
        count = 1 + (number * number * 7) % 180
        text = " ".join(words[(number * 5 + i * (1 + number % 3)) % len(words)] for i in range(count))
        (folder / f"{number:02d}.txt").write_text(text if number else "x")
    return str(folder / "*.txt")


def compare(
    run: Callable[[Sequence[str], int, Path], None], folder: Path, precision: str, cases: Sequence[Sequence[str]] = CASES
) -> list[tuple[str, float]]:
    """Run every case and set its losses against the truth's: (case, largest relative difference).

    Args:
        run: starts (overrides, ranks, run directory) and waits for its end.
        folder: for the data and the runs.
    """
    data = ("data=files", f"data.path={write_documents(folder / 'text')}", f"data.cache={folder / 'cache'}")
    found = []
    truth: list[float] = []
    for number, case in enumerate(cases):
        directory = folder / precision / f"{number:02d}"
        run((*COMMON, *data, f"precision={precision}", *case, f"run_dir={directory}"), ranks_of(case), directory)
        got = losses(directory)
        truth = truth or got
        found.append((" ".join(case), worst(truth, got)))
    return found
