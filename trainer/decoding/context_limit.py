"""Keeps texts that are generated within a context: what `overflow=` says, done to a decoder."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.cache.base import KVCacheFactory
from models.cache.overflow import Overflow, Shift
from models.cache.shifting import cannot_shift, shift
from models.cache.turning import Turn, turns
from trainer.decoding.token_decoder import TokenDecoder

SHORTEST = 4  # tokens of a context: half of one must still hold a prompt


class ContextLimit:
    """A policy and the number of tokens at which it acts.

    Args:
        overflow: the policy.
        tokens: of a context.

    Raises:
        ValueError: a context too short to be cut.
    """

    def __init__(self, overflow: Overflow, tokens: int):
        if tokens < SHORTEST:
            raise ValueError(f"context={tokens} tokens cannot be cut; use {SHORTEST} or more")
        self.overflow = overflow
        self.tokens = tokens
        self._turns: dict[str, Turn] = {}

    def misfits(self, model: nn.Module, cache: KVCacheFactory) -> list[str]:
        """Returns one sentence for each reason why the policy has no meaning here."""
        if not isinstance(self.overflow, Shift):
            return []
        return cannot_shift(model, cache)

    def prepare(self, model: nn.Module) -> None:
        """Is told the model, once it fits."""
        if isinstance(self.overflow, Shift):
            self._turns = turns(model)

    def read(self, prompt: Sequence[int], answer: int) -> list[int]:
        """Returns the tokens of a prompt that are read; see Overflow.prompt."""
        return self.overflow.prompt(prompt, self.tokens, answer)

    def ends(self, context: Sequence[int]) -> bool:
        """Tells whether a text ends here.

        Raises:
            ContextFull: it may not, and has no room.
        """
        return len(context) >= self.tokens and self.overflow.full(self.tokens) is None

    def make_room(
        self,
        decoder: TokenDecoder,
        contexts: list[list[int]],
        blank: Callable[[], TokenDecoder],
    ) -> TokenDecoder:
        """Cuts the contexts that are full, and returns the decoder that holds what they have left.

        Args:
            decoder: holds the contexts without their last token, which is fed next.
            contexts: of the rows of the decoder; changed in place.
            blank: makes a decoder without rows.
        """
        rows = [row for row, context in enumerate(contexts) if len(context) >= self.tokens]
        cut = self.overflow.full(self.tokens) if rows else None
        if cut is None:
            return decoder
        for row in rows:
            contexts[row][:] = cut.of(contexts[row])
        if cut.recompute:
            return _read_again(decoder, contexts, rows, blank)
        start = torch.zeros(len(contexts), dtype=torch.long, device=decoder.device())
        stop = start.clone()
        for row in rows:
            start[row] = cut.start
            stop[row] = cut.stop
            decoder.lengths[row] -= cut.stop - cut.start
        shift(decoder.state, start, stop, self._turns)
        return decoder


def _read_again(
    decoder: TokenDecoder,
    contexts: Sequence[Sequence[int]],
    rows: Sequence[int],
    blank: Callable[[], TokenDecoder],
) -> TokenDecoder:
    """Returns a decoder whose rows at `rows` were read anew."""
    fresh = blank()
    fresh.feed([contexts[row][:-1] for row in rows])
    others = [row for row in range(len(contexts)) if row not in rows]
    if not others:
        return fresh
    decoder.select(others)
    decoder.join(fresh)
    order = [*others, *rows]
    decoder.select([order.index(row) for row in range(len(contexts))])
    return decoder
