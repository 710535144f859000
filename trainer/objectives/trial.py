"""Applies an objective to synthetic rows, for checks that need no data and no tokenizer."""

import torch
from torch import Tensor

from models.span import PADDING, Span
from trainer.data.batch import Batch
from trainer.objectives.base import Objective, Symbols


def trial_symbols(objective: Objective, text: int, length: int) -> Symbols:
    """Returns a vocabulary of `text` tokens without an end of text, and what the objective adds."""
    added = len(objective.words(length))
    return Symbols(text, -1, tuple(range(text, text + added)), text + added)


def trial(
    objective: Objective, tokens: Tensor, span: Span, text: int, seed: int
) -> tuple[Tensor, Span, Tensor]:
    """Applies an objective that rewrites text to rows.

    Args:
        objective: rewrites rows.
        tokens: [B, T] numbers below `text`; the first `objective.reads(T)` of a row are read.
        span: [B, T] their addresses.
        text: number of tokens that text is made of.
        seed: of the objective's choices.

    Returns:
        (tokens, addresses, targets), all [B, T].
    """
    length = tokens.shape[1]
    text_length = objective.reads(length)
    columns = []
    # A Batch holds one token more than is read; here that is padding.
    for column, fill in zip((tokens, *span.addresses()), (0, PADDING, 0, 0), strict=True):
        last = torch.full_like(column[:, :1], fill)
        columns.append(torch.cat([column[:, :text_length], last], 1))
    row_numbers = torch.arange(len(tokens))
    symbols = trial_symbols(objective, text, length)
    batch = objective.apply(Batch(*columns), row_numbers, seed, symbols, length)
    return batch.inputs(), batch.span(), batch.targets()
