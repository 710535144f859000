"""The recipe `induction`: two layers of attention form induction heads, and one layer cannot.

Each trial is a run of `experiment=induction` by the command, on one process; its figures are those
that the run writes while it trains.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from scripts.experiments.runner import Budget
from scripts.experiments.trial import TrialResult
from trainer.logs.jsonl import EVALUATION, read
from trainer.reports.markdown import markdown

LAYERS = (1, 2)
JUMPED = 0.7
INTRODUCTION = """\
### Induction heads
Attention and nothing else, width 64, 4 heads, on rows of different random tokens and the same\
 again.
`score` is the largest weight of any head on the token behind the earlier occurrence of the one at\
 hand (uniform attention: 0.03), `accuracy` that of the repeated tokens (a guess among the 25 of a\
 row: 0.04), `ablated` the same without the found heads."""


class InductionRun(NamedTuple):
    """Outcome of a run.

    Attributes:
        layers: of its model.
        seed: of the run.
        curves: figure -> [(step, value)], in the order of the steps.
        fault: why it failed; None when it did not.
    """

    layers: int
    seed: int
    curves: dict[str, list[tuple[int, float]]]
    fault: str | None = None

    @property
    def jump(self) -> int | None:
        """The first evaluated step whose score is above JUMPED; None = there is none."""
        for step, score in self.curves["score"]:
            if score > JUMPED:
                return step
        return None

    def last(self, figure: str) -> float:
        """Returns a figure at the last step."""
        return self.curves[figure][-1][1]


def induction(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial)."""
    runs = [(layers, seed) for layers in LAYERS for seed in effort.numbers()]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(effort.jobs) as threads:

        def learned(run: tuple[int, int]) -> InductionRun:
            result = train(Path(folder), *run, effort.steps)
            say(f"{_name(result.layers)}, seed {result.seed}: {_ending(result)}")
            return result

        results = list(threads.map(learned, runs))
    rows = [["model", "seed", f"score above {JUMPED} at step", "score", "accuracy", "ablated"]]
    for result in results:
        if result.fault is None:
            jump = "never" if result.jump is None else str(result.jump)
            figures = [f"{result.last(name):.3f}" for name in ("score", "accuracy", "ablated")]
            rows.append([_name(result.layers), str(result.seed), jump, *figures])
    trials = []
    for result in results:
        trials.append(TrialResult(_name(result.layers), result.seed, fault=result.fault))
    return f"{INTRODUCTION}\n\n{markdown(rows)}", trials


def train(folder: Path, layers: int, seed: int, steps: int | None) -> InductionRun:
    """Runs the experiment and returns its figures.

    Args:
        folder: for the directory of the run.
        layers: of the model.
        seed: of the run.
        steps: None = those of the experiment.
    """
    directory = folder / f"{layers}-{seed}"
    words = ["experiment=induction", f"model.layers={layers}", f"seed={seed}"]
    words += [f"run_dir={directory}", "wandb.mode=disabled", "engine=single", "log.plots=false"]
    if steps is not None:
        words.append(f"steps={steps}")
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode != 0:
        return InductionRun(layers, seed, {}, fault=f"exit status {done.returncode}: {done.stderr}")
    return InductionRun(layers, seed, curves_of(directory))


def curves_of(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns the figures of induction that a run wrote, by name."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in read(directory / EVALUATION):
        part, _, figure = row["name"].partition("/")
        if part == "induction":
            curves.setdefault(figure, []).append((row["step"], row["value"]))
    return curves


def _name(layers: int) -> str:
    return "one layer" if layers == 1 else "two layers"


def _ending(result: InductionRun) -> str:
    if result.fault is not None:
        return f"FAILED: {result.fault}"
    figures = [f"{name} {result.last(name):.3f}" for name in ("score", "accuracy", "ablated")]
    return ", ".join(figures)
