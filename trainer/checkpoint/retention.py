"""The choice of the checkpoints that stay: the newest, one every so many steps, and the best."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.logs.jsonl import EVALUATION, read

Scores = Callable[[], Mapping[int, float]]


@dataclass(frozen=True)
class CheckpointRetention:
    """The rules by which checkpoints stay; one that any of them names stays.

    Attributes:
        newest: number of the newest ones, the one just written included; None = all.
        every: of every so many steps the first checkpoint stays for ever; 0 = none does.
        best: number of those with the lowest score that stay; 0 = none.
        scores: returns the scores by step, lower is better; those known when a checkpoint is
            written, after which the older ones are judged.
        ends: steps that stay beyond the rest: those between stages.
    """

    newest: int | None = 2
    every: int = 0
    best: int = 0
    scores: Scores | None = None
    ends: frozenset[int] = frozenset()

    def steps_to_keep(self, steps: Collection[int]) -> set[int]:
        """Returns the steps that stay, of those whose checkpoints there are."""
        ordered = sorted(steps)
        if self.newest is None:
            return set(ordered)
        kept = set(ordered[-self.newest :]) | (self.ends & set(ordered))
        kept |= self._one_every(ordered)
        if self.best and self.scores is not None:
            scores = self.scores()
            # Of equal scores the earlier step: it came to them first.
            ranked = sorted((scores[step], step) for step in ordered if step in scores)
            kept |= {step for _, step in ranked[: self.best]}
        return kept

    def _one_every(self, ordered: Sequence[int]) -> set[int]:
        """Returns the first step in each stretch of `every`; the stretch from 0 on has none.

        What stayed once is the first of its stretch again, whatever was deleted beside it.
        """
        found: set[int] = set()
        stretch = 0
        for step in ordered:
            if self.every and step // self.every > stretch:
                stretch = step // self.every
                found.add(step)
        return found


def figure_scores(directory: Path, figure: str, better: Literal["lowest", "highest"]) -> Scores:
    """Returns a function that reads the scores of a run from its evaluation.jsonl.

    The file is the record that a killed run goes on with, so the choice outlives a kill.

    Args:
        directory: of the run.
        figure: name of the value.
        better: which values are the better ones.
    """
    sign = -1.0 if better == "highest" else 1.0

    def scores() -> dict[int, float]:
        found: dict[int, float] = {}
        for row in read(directory / EVALUATION):
            value = row.get("value")
            if row.get("name") == figure and value is not None:
                found[row["step"]] = sign * value
        return found

    return scores


def better_of(figure: str) -> Literal["lowest", "highest"]:
    """Returns which values of a figure are the better ones, by its name: of a loss the lowest."""
    return "lowest" if figure.endswith(("loss", "perplexity")) else "highest"
