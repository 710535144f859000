"""The parent of all objectives: what a model reads of a row, and has to say at each token.

It is applied to whole rows before they are divided among ranks, and every choice that it draws is a
function of (seed, number of the row, document, position). So a row has the same targets under any
cut, any number of ranks, any micro-batch, and after a resume; the count of targets, the loss, its
evaluation and its positions all follow from the targets.

Letters: R rows, T context length.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.counter_rng import CounterRNG, address, mix_bits
from models.span import Span
from trainer.data.batch import Batch
from trainer.data.tokenizers import Tokenizer


class Symbols(NamedTuple):
    """The numbers of the vocabulary that an objective needs.

    Attributes:
        text: numbers below it may occur in text; they are the tokenizer's.
        end_of_text: the number that ends a document.
        special: mask token or sentinels, in order; the tokenizer's own where it has them, else
            numbers from `text` on. vocabulary: numbers are below it, special ones too.
    """

    text: int
    end_of_text: int
    special: tuple[int, ...]
    vocabulary: int

    @property
    def added(self) -> int:
        """How many numbers the vocabulary has beyond the tokenizer's."""
        return self.vocabulary - self.text


class Objective:
    """Rows as the data gives them, where a token predicts the next one or what the data asks for.

    Attributes:
        name: as in objective=NAME.
        predicts_next: the target of a token is the one that follows it, so no layer may see ahead.
        rewrites: targets are made here, from plain text; data that brings its own targets cannot be
            given to it. carries: rows may go on from the rows before them (memory=).
    """

    name = "next_token"
    predicts_next = True
    rewrites = False
    carries = True

    def words(self, context_length: int) -> list[tuple[str, ...]]:
        """The special tokens that rows of this length need, each by its names in tokenizers.

        Raises:
            ValueError: settings that do not fit this length.
        """
        return []

    def symbols(self, tokenizer: Tokenizer, context_length: int) -> Symbols:
        """The vocabulary under this objective.

        Special tokens are the tokenizer's own if it has all of them, else further numbers.
        """
        words = self.words(context_length)
        lookup: Callable[[str], int | None] | None = getattr(tokenizer, "number", None)
        known = [_first(lookup, names) for names in words] if lookup is not None else []
        own = [number for number in known if number is not None]
        text = tokenizer.vocabulary
        if words and len(own) == len(words):
            return Symbols(text, tokenizer.end_of_text, tuple(own), text)
        special = tuple(range(text, text + len(words)))
        return Symbols(text, tokenizer.end_of_text, special, text + len(words))

    def reads(self, context_length: int) -> int:
        """How many tokens of text make a row of `context_length` tokens.

        Raises:
            ValueError: rows of this length leave no room.
        """
        return context_length

    def apply(
        self, batch: Batch, rows: Tensor, seed: int, symbols: Symbols, context_length: int
    ) -> Batch:
        """The rows [R, context_length + 1] that the model is trained on.

        Args:
            batch: [R, reads(context_length) + 1] text.
            rows: [R] int64, the number of each row in the run or in the evaluation.
            seed: of all choices.
        """
        return batch

    def describe(self, symbols: Symbols, context_length: int) -> str:
        """One line for the log."""
        return "every token predicts the next one"


def draw(purpose: str, seed: int, rows: Tensor, span: Span, channels: int) -> Tensor:
    """[R, T, channels] float64 in [0, 1), a function of seed, number of the row and address."""
    return CounterRNG(seed, f"objective {purpose}", 0)(
        mix_bits(rows)[:, None] ^ address(span), channels
    )


def share_between(name: str, value: float, low: float, high: float, example: float) -> float:
    """A share that lies in low .. high, both included.

    Raises:
        ValueError: it does not; says what to write.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"objective.{name}={value}: a share from {low:g} to {high:g} is needed; for "
            f"example {example:g}"
        )
    return float(value)


def _first(lookup: Callable[[str], int | None], names: tuple[str, ...]) -> int | None:
    """The number of the first of these words that a tokenizer has as one token."""
    numbers = [lookup(name) for name in names]
    return next((number for number in numbers if number is not None), None)


def text_only(batch: Batch) -> Span:
    """[R, T] the addresses of the tokens read, without a row's last, which the next row reads."""
    return Span(batch.pos[:, :-1], batch.doc[:, :-1], torch.zeros_like(batch.role[:, :-1]))
