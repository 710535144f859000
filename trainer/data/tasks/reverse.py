"""Reverse: a source of random symbols, to be said from its end to its beginning."""

import numpy as np

from models.ranges import Many
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole


class Reverse(SyntheticTask):
    """A sequence of symbols as the source of its reversal, for models of two streams.

    Token numbers: symbols from 0 to symbols - 1, then END. The source is the symbols and END; the
    row is END as a start, the symbols in reverse order, and END.

    Args:
        min_length, max_length: symbols in a sequence.
        symbols: number of different ones.
        source_length: tokens in a row of sources; None = as many as in a row.
        held_out, per_row: as in SyntheticTask.
    """

    def __init__(
        self,
        *,
        min_length: Many = 4,
        max_length: Many = 16,
        symbols: Many = 16,
        source_length: Many | None = None,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_length, max_length)
        self.symbols = whole("symbols", symbols, 1)
        if source_length is not None:
            self.source_length = whole("source_length", source_length, 1)
        self.opens = symbols
        self.vocabulary = symbols + 1
        self.longest = max_length + 2
        self.longest_source = max_length + 1

    def example(self, random: np.random.Generator) -> Example:
        """See SyntheticTask.example."""
        length = int(random.integers(*self.sizes, endpoint=True))
        shown = random.integers(0, self.symbols, length)
        tokens = np.concatenate([[self.opens], shown[::-1], [self.opens]])
        source = np.concatenate([shown, [self.opens]])
        return Example(tokens, np.zeros(len(tokens), bool), source=source)
