"""What a position scheme may do: add to the embeddings, turn queries and keys, or shape the scores."""

from torch import Tensor, nn

from models.scores import Score
from models.span import Span


class Position:
    """The parent of all schemes, and a scheme of its own: no positions at all (the mask alone gives the order).

    Source: Haviv et al. 2022 (arXiv:2203.16634); Kazemnejad et al. 2023 (arXiv:2305.19466).

    Attributes:
        max_length: longest document in tokens that the scheme can address, or None where there is no such limit.
    """

    max_length: int | None = None

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] that is added to the token embeddings, or None."""
        return None

    def turn(self, x: Tensor, span: Span) -> Tensor:
        """Queries or keys [B, T, H, D] as they enter the scores."""
        return x

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """What becomes of the logits, and a module whose call gives the score's params (a tuple), or None."""
        return Score(), None
