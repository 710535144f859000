"""Tasks on vectors of random bits, as the Neural Turing Machine was shown on; a vector of 8 bits is
a token from 0 to 255.

Letters: N tokens that were predicted.
"""

import numpy as np

from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, Grades, SyntheticTask, aimed, nothing, whole

MOST_BITS = 12  # a vocabulary of 4096 vectors

MARKS = 3  # tokens that are no vectors: behind them a task may have more


class Vectors(SyntheticTask):
    """A question in vectors and marks, then as many blanks as the answer has tokens: nothing of the
    answer is shown.

    Token numbers: vectors from 0 to 2^bits - 1, then the marks START, END and BLANK, then the
    `more` marks of the task. The answer's first token is said at END, each further one at a BLANK.

    Source: Graves et al. 2014 (arXiv:1410.5401), section 4. There marks are channels of their own
    beside the bits, and a blank is a vector of zeros; here they are tokens, so that any model of
    tokens can be trained on the task.
    """

    aimed = True

    def __init__(self, *, bits: int, more: int, held_out: float, per_row: int | None):
        super().__init__(held_out=held_out, per_row=per_row)
        if whole("bits", bits, 1) > MOST_BITS:
            raise DataError(
                f"data.bits={bits} would make a vocabulary of 2^{bits} vectors; give at most"
                f" {MOST_BITS}"
            )
        self.bits = bits
        self.start, self.end, self.blank = (2**bits + mark for mark in range(MARKS))
        self.vocabulary = 2**bits + MARKS + more
        self.opens = 2**bits

    def vectors(self, random: np.random.Generator, count: int) -> list[int]:
        """Random ones."""
        return random.integers(0, 2**self.bits, count).tolist()

    def answered(self, question: list[int], answer: list[int]) -> Example:
        """The example that asks `question` between START and END, and wants `answer`."""
        blanks = [self.blank] * (len(answer) - 1)
        return aimed(
            [self.start, *question, self.end, *blanks], [*nothing(len(question) + 1), *answer]
        )

    def grade(self, predicted: np.ndarray, target: np.ndarray) -> Grades:
        """Also counts wrong bits over targets that are vectors; where a mark was said instead, all
        bits are wrong."""
        vectors = target < 2**self.bits
        said = predicted[vectors]
        wanted = target[vectors]
        differing = np.where(said < 2**self.bits, said ^ wanted, 2**self.bits - 1)
        wrong = sum(int((differing >> bit & 1).sum()) for bit in range(self.bits))
        return {**super().grade(predicted, target), "wrong_bits": (wrong, self.bits * len(wanted))}
