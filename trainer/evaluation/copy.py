"""Copying: a string of random tokens and then the same string again, by its length."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from models.loss import IGNORE
from models.ranges import Range
from trainer.config.finding import Finding
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean
from trainer.evaluation.recall import check_vocabulary, text_tokens
from trainer.evaluation.scoring import ScoredRow, score_rows

CopyLength = Annotated[int, Range(1, 2**23)]


class Copy(Evaluation):
    """An opening token, a random string, the opening token, and the string to be written again.

    Args:
        lengths: tokens of the string; a row has twice as many and two. None = as many as fit the
            context length.
        alphabet: different tokens of a string; a token is right where it is rated above all others
            of the alphabet, and chance is 1 / alphabet.
        examples: rows of each length.
        every: as in Evaluation.

    Source: the copying task of Jelassi et al. 2024 (arXiv:2402.01032), with an alphabet that is
    drawn anew from the vocabulary in every row.
    """

    def __init__(
        self,
        *,
        lengths: list[CopyLength] | None = None,
        alphabet: Annotated[int, Range(2, 2**16)] = 16,
        examples: Annotated[int, Range(1, 4096)] = 16,
        every: Every = None,
    ):
        super().__init__(every=every)
        if lengths == []:
            raise ValueError("lengths must not be empty; name one at least")
        self.lengths = lengths
        self.alphabet = alphabet
        self.examples = examples

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        yield from check_vocabulary(facts, "alphabet", self.alphabet, self.alphabet + 1)
        for length in self.lengths or self._longest(facts.config.context_length):
            yield from facts.check_length("lengths", self.lengths, 2 * length + 1)

    def run(self, context: EvaluationContext) -> list[Figure]:
        cells = []
        for length in self.lengths or self._longest(context.config.context_length):
            rows = []
            for number in range(self.examples):
                rng = np.random.default_rng([length, self.alphabet, number])
                rows.append(self.row(length, text_tokens(context), rng))
            scores = score_rows(context, rows, f"copy at {length}")
            total = float(scores.count.sum())
            cells.append(
                {
                    "length": length,
                    "accuracy": float(scores.chosen.sum()) / total,
                    "whole": float((scores.chosen > scores.count - 0.5).double().mean()),
                    "loss": scores.loss,
                    "examples": self.examples,
                }
            )
        return [
            Figure(
                "accuracy", mean([cell["accuracy"] for cell in cells]), 1 / self.alphabet, cells
            ),
            Figure("whole", mean([cell["whole"] for cell in cells])),
            Figure("loss", mean([cell["loss"] for cell in cells])),
        ]

    def row(self, length: int, tokens: np.ndarray, rng: np.random.Generator) -> ScoredRow:
        """Draws a row of 2 x length + 1 tokens that the model reads."""
        drawn = rng.choice(tokens, self.alphabet + 1, replace=False)
        string = rng.choice(drawn[:-1], length)
        opening = drawn[-1:]
        row = np.concatenate([opening, string, opening, string[:-1]])
        targets = np.full(len(row), IGNORE, np.int64)
        targets[length + 1 :] = string
        return ScoredRow(row, targets, np.sort(drawn[:-1]))

    def _longest(self, context_length: int) -> list[int]:
        return [max(1, (context_length - 1) // 2)]
