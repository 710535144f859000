"""Mixers made of queries and of what tokens hold out to be seen; the two may belong to different tokens.

Letters: B rows, T queries, S tokens that are seen.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.span import Span


class Attending(nn.Module):
    """The parent of mixers that split so: `attend` makes queries of some tokens and lets them look at a payload of others.

    Attributes:
        recall: (x [B, T, width], span) -> (tokens that may be seen [B, S, width], x itself the last of them, their
            addresses), as a memory has it; None: a row sees itself alone.
    """

    recall: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("recall", None)

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """What tokens [B, S, width] hold out to be seen: tensors [B, S, ...], each token's for itself."""
        raise NotImplementedError

    def attend(self, x: Tensor, span: Span, payload: tuple[Tensor, ...], of: Span) -> Tensor:
        """[B, T, width] -> [B, T, width], given what the tokens `of` hold out."""
        raise NotImplementedError

    def forward(self, x: Tensor, span: Span, norm: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """[B, T, width] -> [B, T, width].

        Args:
            norm: applied to x, and to what is recalled, first: what is kept has not been through it, so that its weights
                are today's and learn from what is recalled too.
        """
        seen, of = (x, span) if self.recall is None else self.recall(x, span)
        seen = seen if norm is None else norm(seen)
        live = seen[:, seen.shape[1] - x.shape[1] :]
        return self.attend(live, span, self.payload(seen, of), of)
