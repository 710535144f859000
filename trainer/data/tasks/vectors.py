"""Tasks on vectors of random bits, from the Neural Turing Machine; a vector is one token.

Letters: N tokens that were predicted.
"""

import numpy as np

from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, Grades, SyntheticTask, aimed, nothing, whole

MOST_BITS = 12  # a vocabulary of 4096 vectors

MARKS = 3  # START, END and BLANK; the marks of a task follow them


class Vectors(SyntheticTask):
    """A question in vectors and marks, then a blank for every token of the answer but the first.

    Token numbers: vectors from 0 to 2^bits - 1, then the marks START, END and BLANK, then the
    `more` marks of the task. The answer's first token is predicted at END, each further one at a
    BLANK.

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
        """Draws random vectors."""
        return random.integers(0, 2**self.bits, count).tolist()

    def answered(self, question: list[int], answer: list[int]) -> Example:
        """Builds the example with `question` between START and END, and `answer` as targets."""
        # The answer itself is never shown, so that one error does not mislead later tokens.
        blanks = [self.blank] * (len(answer) - 1)
        tokens = [self.start, *question, self.end, *blanks]
        return aimed(tokens, [*nothing(len(question) + 1), *answer])

    def grade(self, predicted: np.ndarray, target: np.ndarray) -> Grades:
        """Counts right tokens, and wrong bits over targets that are vectors."""
        is_vector = target < 2**self.bits
        predicted_vectors = predicted[is_vector]
        target_vectors = target[is_vector]
        differing = predicted_vectors ^ target_vectors
        # A mark has no bits: all of them count as wrong.
        differing = np.where(predicted_vectors < 2**self.bits, differing, 2**self.bits - 1)
        wrong = sum(int((differing >> bit & 1).sum()) for bit in range(self.bits))
        grades = super().grade(predicted, target)
        grades["wrong_bits"] = (wrong, self.bits * len(target_vectors))
        return grades
