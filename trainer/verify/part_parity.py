"""Compares a part that is named on the command line with one device, in every way to cut a row.

The model is the small twin of scripts.doctor; a case compares its losses and all gradients on 2, 3
or 4 ranks with those of one device, in float64.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.mesh import build_mesh
from trainer.config.schema import Config
from trainer.errors import BUG, UserError
from trainer.preflight.prepare import load_config
from trainer.run_dir import plain_config
from trainer.verify.crew import Crews
from trainer.verify.doctor import Examination

METHODS = ("ring", "ulysses", "allgather", "usp")
LAYOUTS = ("zigzag", "contiguous", "balanced")
RANKS = (2, 3, 4)
CASE_S = 300.0
# usp divides ranks into a grid: 2 x 2 is the smallest with two sides.
GRID = ("parallel.ulysses=2", "parallel.ring=2")
GRID_RANKS = 4


@dataclass(frozen=True)
class Comparison:
    """One way to cut a row.

    Attributes:
        method: of the softmax; a part without one is shared in its own way under each.
        layout: which tokens a rank holds.
        ranks: that share the row.
        figure: largest relative difference of a loss or a gradient; None where the way is refused.
        passed: it is below its bound.
        refusal: why the way is refused.
    """

    method: str
    layout: str
    ranks: int
    figure: float | None = None
    passed: bool = True
    refusal: str = ""


def compare_part(words: Sequence[str]) -> Iterator[Comparison]:
    """Compares the model of some settings in every way.

    Args:
        words: settings of a run, without those of parallel.

    Raises:
        UserError: the settings are at fault whatever way is taken, or ranks ended in an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        crews = Crews(Path(folder))
        try:
            _answer(crews, 1, _check, words)
            for method in METHODS:
                for layout in LAYOUTS:
                    for ranks in RANKS if method != "usp" else (GRID_RANKS,):
                        yield _compare(crews, words, method, layout, ranks)
        finally:
            crews.close()


def _compare(
    crews: Crews, words: Sequence[str], method: str, layout: str, ranks: int
) -> Comparison:
    way = [f"parallel.context={ranks}", f"parallel.method={method}", f"parallel.layout={layout}"]
    if method == "usp":
        way += GRID
    try:
        tree = _answer(crews, 1, _check, [*words, *way])
    except UserError as error:
        return Comparison(method, layout, ranks, refusal=str(error).splitlines()[0])
    figure, passed = _answer(crews, ranks, _examine, tree, ranks)
    return Comparison(method, layout, ranks, figure, passed)


def _answer(crews: Crews, size: int, work: Any, *arguments: Any) -> Any:
    """Returns what rank 0 answers.

    Raises:
        UserError: the settings are refused, or a rank ended in an error.
    """
    answer = crews.run(size, work, *arguments, seconds=CASE_S)
    if not answer.values:
        raise UserError(f"the comparison failed: {answer.trace.strip()}", BUG)
    value = answer.values[0]
    if isinstance(value, str):
        raise UserError(value)
    return value


def _check(rank: int, words: Sequence[str]) -> dict[str, Any] | str:
    """Returns the config of some settings as plain data, or the message of a refusal."""
    try:
        return plain_config(load_config(words, say=lambda line: None))
    except UserError as error:
        return str(error)


def _examine(rank: int, tree: dict[str, Any], ranks: int) -> tuple[float, bool]:
    config = Config.model_validate(tree)
    mesh = build_mesh(ranks, 1, ulysses=config.parallel.ulysses, ring=config.parallel.ring)
    lines = list(Examination(config, mesh).parity())
    return max(line.figure for line in lines), all(line.passed for line in lines)
