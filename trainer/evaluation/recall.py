"""Multi-query associative recall in the model's own tokens, by the length of the row."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from models.loss import IGNORE
from models.ranges import Range
from trainer.config.finding import Finding
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean
from trainer.evaluation.scoring import ScoredRow, score_rows

RecallLength = Annotated[int, Range(4, 2**24)]


class Recall(Evaluation):
    """Pairs of a key and a value, then filler, then every key again, each followed by its value.

    The value is right where the model rates it above the other values of the row.

    Args:
        lengths: tokens of a row; None = the context length.
        pairs: of a key and a value in a row; chance is 1 / pairs.
        examples: rows of each length.
        every: as in Evaluation.

    Source: Arora et al. 2023 (arXiv:2312.04927). Here all queries stand at the end of the row, so
    that the length is the distance, and keys, values and the one token of filler are drawn anew
    from the vocabulary in every row.
    """

    def __init__(
        self,
        *,
        lengths: list[RecallLength] | None = None,
        pairs: Annotated[int, Range(2, 2**16)] = 8,
        examples: Annotated[int, Range(1, 4096)] = 16,
        every: Every = None,
    ):
        super().__init__(every=every)
        if lengths == []:
            raise ValueError("lengths must not be empty; name one at least")
        self.lengths = lengths
        self.pairs = pairs
        self.examples = examples

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        yield from check_vocabulary(facts, "pairs", self.pairs, 2 * self.pairs + 1)
        for length in self.lengths or [facts.config.context_length]:
            yield from facts.check_length("lengths", self.lengths, length)
            if length < 4 * self.pairs:
                yield Finding(
                    facts.key("lengths"),
                    self.lengths or [length],
                    f"{self.pairs} pairs and as many queries take {4 * self.pairs} tokens, a row"
                    f" has {length}",
                    f"use {4 * self.pairs} or more, or {facts.key('pairs')}={max(2, length // 4)}",
                )

    def run(self, context: EvaluationContext) -> list[Figure]:
        cells = []
        for length in self.lengths or [context.config.context_length]:
            rows = []
            for number in range(self.examples):
                rng = np.random.default_rng([length, self.pairs, number])
                rows.append(self.row(length, text_tokens(context), rng))
            scores = score_rows(context, rows, f"recall at {length}")
            total = float(scores.count.sum())
            cells.append(
                {
                    "length": length,
                    "pairs": self.pairs,
                    "accuracy": float(scores.chosen.sum()) / total,
                    "exact": float(scores.likeliest.sum()) / total,
                    "loss": scores.loss,
                    "examples": self.examples,
                }
            )
        return [
            Figure("accuracy", mean([cell["accuracy"] for cell in cells]), 1 / self.pairs, cells),
            Figure("exact", mean([cell["exact"] for cell in cells]), 1 / context.vocabulary),
            Figure("loss", mean([cell["loss"] for cell in cells])),
        ]

    def row(self, length: int, tokens: np.ndarray, rng: np.random.Generator) -> ScoredRow:
        """Draws a row: [key value]* filler* [key value]*, the values at the end to be told.

        Args:
            length: tokens of the row.
            tokens: those that may be drawn.
            rng: draws them.
        """
        drawn = rng.choice(tokens, 2 * self.pairs + 1, replace=False)
        keys = drawn[: self.pairs]
        values = drawn[self.pairs : -1]
        row = np.full(length, drawn[-1], np.int64)
        targets = np.full(length, IGNORE, np.int64)
        row[0 : 2 * self.pairs : 2] = keys
        row[1 : 2 * self.pairs : 2] = values
        order = rng.permutation(self.pairs)
        begin = length - 2 * self.pairs
        row[begin::2] = keys[order]
        row[begin + 1 :: 2] = values[order]
        targets[begin::2] = values[order]
        return ScoredRow(row, targets, np.sort(values))


def text_tokens(context: EvaluationContext) -> np.ndarray:
    """Returns the tokens that may stand in a row: all of the data's but what ends a document."""
    tokenizer = context.tokenizer
    tokens = np.arange(tokenizer.vocabulary)
    return tokens[tokens != tokenizer.end_of_text]


def check_vocabulary(facts: RunFacts, setting: str, value: int, needed: int) -> Iterator[Finding]:
    """Checks that the data has so many different tokens beside the end of a document."""
    known = facts.tokenizer.vocabulary - 1
    if needed > known:
        yield Finding(
            facts.key(setting),
            value,
            f"a row needs {needed} different tokens, and the run's data has {known}",
            "use fewer",
        )
