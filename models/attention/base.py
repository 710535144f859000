"""Base class of mixers in which queries and the tokens they see may be different tokens.

Letters: B rows, T queries, S tokens that are seen.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.layer import Layer
from models.span import Span


class SplitAttention(Layer):
    """Base of mixers that split into a payload of the tokens seen and queries that attend to it.

    Attributes:
        recall: a memory of earlier tokens, or None: a row sees itself alone. It maps (hidden
            [B, T, width], span) to (pieces that concatenate to [B, S, width], the last one `hidden`
            itself; the addresses of all S tokens).
    """

    recall: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        # registered as a module so that a memory set later joins the state dict
        self.register_module("recall", None)

    def payload(self, hidden: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Computes what tokens [B, S, width] offer to queries: tensors [B, S, ...], per token."""
        raise NotImplementedError(f"{type(self).__name__} must define `payload`")

    def attend(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given the payload of the tokens of `kv_span`."""
        raise NotImplementedError(f"{type(self).__name__} must define `attend`")

    def forward(
        self, hidden: Tensor, span: Span, norm: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """[B, T, width] -> [B, T, width].

        Args:
            norm: applied first, to `hidden` and to recalled tokens. A memory stores tokens before
                the norm, so that they pass today's norm weights, which learn from them too.
        """
        pieces = [hidden]
        kv_span = span
        if self.recall is not None:
            pieces, kv_span = self.recall(hidden, span)
        if norm is not None:
            pieces = [norm(piece) for piece in pieces]
        return self.attend(pieces[-1], span, self._payload(pieces, kv_span), kv_span)

    def _payload(self, pieces: list[Tensor], kv_span: Span) -> tuple[Tensor, ...]:
        """The payload of all pieces, concatenated along the tokens."""
        if len(pieces) == 1:
            return self.payload(pieces[0], kv_span)
        # Each piece is projected by itself: no gradient flows into recalled tokens, and one
        # projection of all of them would compute it.
        payloads = []
        start = 0
        for piece in pieces:
            part = slice(start, start + piece.shape[1])
            piece_span = kv_span.map(lambda addresses, part=part: addresses[:, part])
            payloads.append(self.payload(piece, piece_span))
            start = part.stop
        return tuple(torch.cat(tensors, 1) for tensors in zip(*payloads, strict=True))
