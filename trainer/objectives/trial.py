"""An objective on rows that were made up, for proofs that need no data and no tokenizer."""

import torch
from torch import Tensor

from models.span import PADDING, Span
from trainer.data.batch import Batch
from trainer.objectives.base import Objective, Symbols


def trial_symbols(objective: Objective, text: int, length: int) -> Symbols:
    """A vocabulary of `text` numbers, none of which ends a document, and what the objective
    adds."""
    added = len(objective.words(length))
    return Symbols(text, -1, tuple(range(text, text + added)), text + added)


def trial(
    objective: Objective, tokens: Tensor, span: Span, text: int, seed: int
) -> tuple[Tensor, Span, Tensor]:
    """Tokens, addresses and targets, all [B, T], that an objective which rewrites makes of rows.

    Args:
        tokens: [B, T] numbers below `text`, addressed by `span`; read as far as the answer lets it.
    """
    length = tokens.shape[1]
    read = objective.reads(length)
    columns = zip((tokens, *span.addresses()), (0, PADDING, 0, 0), strict=True)
    rows = Batch(
        *(torch.cat([x[:, :read], torch.full_like(x[:, :1], fill)], 1) for x, fill in columns)
    )
    numbers = torch.arange(len(tokens))
    batch = objective.apply(rows, numbers, seed, trial_symbols(objective, text, length), length)
    return batch.inputs(), batch.span(), batch.targets()
