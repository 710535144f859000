"""Mixers made of queries and of what tokens hold out to be seen; the two may belong to different
tokens.

Letters: B rows, T queries, S tokens that are seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.span import Span


class SplitAttention(nn.Module):
    """The parent of mixers that split so: `attend` makes queries of some tokens and lets them look
    at a payload of others.

    Attributes: recall: (x [B, T, width], span) -> (tokens that may be seen, pieces that add up to
        [B, S, width], x itself the last
            of them; addresses of all), as a memory has it; None: a row sees itself alone.
    """

    recall: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("recall", None)

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """What tokens [B, S, width] hold out to be seen: tensors [B, S, ...], each token's for
        itself."""
        raise NotImplementedError

    def attend(self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width], given what the tokens `of` hold out."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, span: Span, norm: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[B, T, width] -> [B, T, width].

        Args:
            norm: applied to x, and to what is recalled, first: what is kept has not been through
                it, so that its weights are today's and learn from what is recalled too.
        """
        pieces, kv_span = ([x], span) if self.recall is None else self.recall(x, span)
        pieces = pieces if norm is None else [norm(piece) for piece in pieces]
        return self.attend(pieces[-1], span, self._payload(pieces, kv_span), kv_span)

    def _payload(self, pieces: list[Tensor], kv_span: Span) -> tuple[Tensor, ...]:
        """As payload of all pieces in a row. Each is projected by itself: into what is only
        recalled no gradient flows."""
        if len(pieces) == 1:
            return self.payload(pieces[0], kv_span)
        found = []
        start = 0
        for piece in pieces:
            stop = start + piece.shape[1]
            found.append(
                self.payload(piece, kv_span.map(lambda a, start=start, stop=stop: a[:, start:stop]))
            )
            start = stop
        return tuple(torch.cat(parts, 1) for parts in zip(*found, strict=True))
