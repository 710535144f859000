"""Base class of objectives, which make the inputs and the targets of a row.

An objective is applied to whole rows before they are divided among ranks, and each of its random
choices is a function of (seed, number of the row, document, position). A row therefore has the same
targets under any sharding, any number of ranks, any micro-batch, and after a resume; the number of
targets, the loss and its evaluation all follow from the targets.

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
    """Token numbers that an objective needs.

    Attributes:
        text: numbers below it may occur in text; they are the tokenizer's.
        end_of_text: the number that ends a document.
        special: mask token or sentinels, in order; the tokenizer's own where it has them, else
            numbers from `text` on.
        vocabulary: number of all tokens, special ones included.
    """

    text: int
    end_of_text: int
    special: tuple[int, ...]
    vocabulary: int

    @property
    def added(self) -> int:
        """Number of special tokens beyond the tokenizer's."""
        return sum(number >= self.text for number in self.special)


class Objective:
    """Leaves rows as they are: a token predicts the next one, or the aim that the data gives.

    Attributes:
        name: as in objective=NAME.
        predicts_next: the target of a token is the one that follows it, so no layer may see ahead.
        rewrites: targets are made here, from plain text; data with targets of its own is refused.
        carries: rows may continue the rows before them (memory=).
    """

    name = "next_token"
    predicts_next = True
    rewrites = False
    carries = True

    def words(self, context_length: int) -> list[tuple[str, ...]]:
        """Lists the special tokens that rows of this length need, each by its possible names.

        Raises:
            ValueError: settings that do not fit this length.
        """
        return []

    def symbols(self, tokenizer: Tokenizer, context_length: int) -> Symbols:
        """Returns the vocabulary under this objective.

        Special tokens are the tokenizer's own if it has all of them, else further numbers.
        """
        words = self.words(context_length)
        text = tokenizer.tokens
        # The byte tokenizer has no named tokens, and so no such method.
        lookup: Callable[[str], int | None] | None = getattr(tokenizer, "number", None)
        own: list[int] = []
        if lookup is not None:
            for names in words:
                number = _first_number(lookup, names)
                if number is not None:
                    own.append(number)
        # All or none: a mixture would give sentinels an order that no tokenizer has.
        if words and len(own) == len(words):
            return Symbols(text, tokenizer.end_of_text, tuple(own), tokenizer.vocabulary)
        special = tuple(range(text, text + len(words)))
        # Numbers that pad the vocabulary are free for them.
        vocabulary = max(text + len(words), tokenizer.vocabulary)
        return Symbols(text, tokenizer.end_of_text, special, vocabulary)

    def reads(self, context_length: int) -> int:
        """Returns the number of tokens of text that make a row of `context_length` tokens.

        Raises:
            ValueError: rows of this length leave no room.
        """
        return context_length

    def apply(
        self, batch: Batch, rows: Tensor, seed: int, symbols: Symbols, context_length: int
    ) -> Batch:
        """Makes the rows [R, context_length + 1] that the model is trained on.

        Args:
            batch: [R, reads(context_length) + 1] text.
            rows: [R] int64, the number of each row in the run or in the evaluation.
            seed: of all choices.
            symbols: as `symbols` returns them.
            context_length: tokens that the model reads of a row.
        """
        return batch

    def describe(self, symbols: Symbols, context_length: int) -> str:
        """Returns one line for the log."""
        return "every token predicts the next one"


def draw(purpose: str, seed: int, rows: Tensor, span: Span, channels: int) -> Tensor:
    """Draws [R, T, channels] float64 in [0, 1), a function of seed, number of the row and address.

    Args:
        purpose: separates the draws of different objectives.
        seed: of the run, or 0 for held-out data.
        rows: [R] int64.
        span: [R, T] addresses.
        channels: numbers for each token.
    """
    generator = CounterRNG(seed, f"objective {purpose}", 0)
    # Row numbers are mixed first: a plain one could cancel a difference of the addresses.
    return generator(mix_bits(rows)[:, None] ^ address(span), channels)


def share_between(name: str, value: float, low: float, high: float, example: float) -> float:
    """Checks that a setting is a share in low .. high, both included, and returns it.

    Raises:
        ValueError: it is not; the message gives `example`.
    """
    # Python counts True as the number 1.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(
            f"objective.{name}={value}: a share from {low:g} to {high:g} is needed; for "
            f"example {example:g}"
        )
    return float(value)


def _first_number(lookup: Callable[[str], int | None], names: tuple[str, ...]) -> int | None:
    """Returns the number of the first of these words that a tokenizer has as one token."""
    for name in names:
        number = lookup(name)
        if number is not None:
            return number
    return None


def text_only(batch: Batch) -> Span:
    """Returns the addresses [R, T] of the tokens, without each row's last, which the next reads."""
    return Span(batch.pos[:, :-1], batch.doc[:, :-1], torch.zeros_like(batch.role[:, :-1]))
