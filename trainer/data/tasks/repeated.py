"""Repeated random tokens: the second half is what the first half was."""

import numpy as np

from models.ranges import Many
from trainer.data.errors import DataError
from trainer.data.tasks.base import Example, SyntheticTask, bounds, whole


class Repeated(SyntheticTask):
    """Different random tokens, and the same again; the tokens of the second half are predicted.

    The first of them cannot be known: nothing says that the repetition begins. What comes after it
    can, from the token behind the earlier occurrence of the last one, which is what induction heads
    look up (trainer/evaluation/induction.py scores them).

    Args:
        vocabulary: different tokens that there are, and one that stands in no example, which ends a
            generated sample.
        min_length, max_length: tokens before they are repeated.
        held_out, per_row: as in SyntheticTask.

    Source: Olsson et al. 2022 (arXiv:2209.11895), who examine models of text with such rows; here
    models are trained on them.
    """

    def __init__(
        self,
        *,
        vocabulary: Many = 64,
        min_length: Many = 8,
        max_length: Many = 32,
        held_out: float = 0.1,
        per_row: int | None = None,
    ):
        super().__init__(held_out=held_out, per_row=per_row)
        self.sizes = bounds(min_length, max_length, least=2)
        if max_length > whole("vocabulary", vocabulary, 2):
            raise DataError(
                f"data.max_length={max_length} tokens cannot all differ among"
                f" data.vocabulary={vocabulary}; use data.vocabulary={max_length} or more"
            )
        self.vocabulary = vocabulary + 1
        self.longest = 2 * max_length

    def example(self, random: np.random.Generator) -> Example:
        """See SyntheticTask.example."""
        length = int(random.integers(*self.sizes, endpoint=True))
        # Token 0 is the one that ends a sample.
        tokens = 1 + random.permutation(self.vocabulary - 1)[:length]
        given = np.repeat([True, False], length)
        return Example(np.concatenate([tokens, tokens]).astype(np.int64), given)
