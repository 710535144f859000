"""objective=masked: some tokens are hidden, and the model predicts them."""

import torch
from torch import Tensor

from models.loss import IGNORE
from trainer.data.batch import Batch
from trainer.objectives.base import Objective, Symbols, draw, share_between, text_only

NAMES = ("[MASK]", "<mask>", "<|mask|>", "<MASK>")  # the mask token in common tokenizers


class Masked(Objective):
    """Masked language modelling (Devlin et al. 2018, arXiv:1810.04805).

    Each token is chosen independently with `probability`. A chosen token is the target at its own
    position; the model reads the mask token there in `mask` of the cases, a random token of the
    text's vocabulary in `random` of them, and the token itself in the rest. Tokens that are not
    chosen have no target. The token that ends a document is never chosen.

    In training a text is masked anew each time it is read (Liu et al. 2019, arXiv:1907.11692); in
    evaluation always in the same way, whatever the seed.

    Meant for layers that see both sides of a token. BERT draws exactly 15 % of each sequence; here
    each token is drawn independently, so that the choice does not depend on how rows are packed or
    cut.

    Args:
        probability: share of the tokens that are chosen.
        mask: share of the chosen ones that are replaced by the mask token.
        random: share of the chosen ones that are replaced by a random token.

    Raises:
        ValueError: a share out of its range.
    """

    name = "masked"
    predicts_next = False
    rewrites = True

    def __init__(self, probability: float = 0.15, mask: float = 0.8, random: float = 0.1):
        self.probability = share_between("probability", probability, 0, 1, 0.15)
        if not self.probability:
            raise ValueError(
                "objective.probability=0: no token would have a target; for example 0.15"
            )
        self.mask = share_between("mask", mask, 0, 1, 0.8)
        self.random = share_between("random", random, 0, 1, 0.1)
        if self.mask + self.random > 1 + 1e-12:
            raise ValueError(
                f"objective.mask={mask} and objective.random={random} are shares of the "
                "chosen tokens and exceed 1 "
                f"together; use objective.random={round(1 - self.mask, 6):g} or less"
            )

    def words(self, context_length: int) -> list[tuple[str, ...]]:
        """See Objective."""
        return [NAMES]

    def apply(
        self, batch: Batch, rows: Tensor, seed: int, symbols: Symbols, context_length: int
    ) -> Batch:
        """See Objective."""
        span = text_only(batch)
        text = batch.tokens[:, :-1]
        # Three numbers for every token, so that no draw depends on the outcome of another.
        choice, kind, number = draw("masked", seed, rows, span, 3).unbind(-1)
        is_target = span.valid() & (text != symbols.end_of_text) & (choice < self.probability)
        is_random = (kind >= self.mask) & (kind < self.mask + self.random)
        # Rounding may bring a number just below 1 up to the vocabulary.
        random_tokens = (number * symbols.text).long().clamp_max(symbols.text - 1)
        masked_or_same = torch.where(kind < self.mask, symbols.special[0], text)
        replacement = torch.where(is_random, random_tokens, masked_or_same)
        tokens = batch.tokens.clone()
        tokens[:, :-1] = torch.where(is_target, replacement, text)
        aims = torch.full_like(batch.tokens, IGNORE)
        aims[:, :-1] = torch.where(is_target, text, IGNORE)
        return batch._replace(tokens=tokens, aims=aims)

    def describe(self, symbols: Symbols, context_length: int) -> str:
        """See Objective."""
        unchanged = max(0.0, 1 - self.mask - self.random)
        where = (
            f"added, vocabulary {symbols.vocabulary}" if symbols.added else "the tokenizer's own"
        )
        return (
            f"masked: {self.probability:.3g} of the tokens are targets; of these "
            f"{self.mask:.3g} are read as token "
            f"{symbols.special[0]} ({where}), {self.random:.3g} as a random token, {unchanged:.3g} "
            "as they are"
        )
