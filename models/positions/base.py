"""Position schemes: add to the embeddings, rotate queries and keys, or shape the scores."""

from torch import Tensor, nn

from models.scores import Score
from models.span import Span


class Position:
    """Base of all schemes; by itself it adds no positions, and the mask alone gives the order.

    Attributes:
        max_length: longest document in tokens that the scheme can address; None: no limit.

    Source: Haviv et al. 2022 (arXiv:2203.16634); Kazemnejad et al. 2023 (arXiv:2305.19466).
    """

    max_length: int | None = None

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] that is added to the token embeddings, or None."""
        return None

    def rotate(self, hidden: Tensor, span: Span) -> Tensor:
        """Applies positions to queries or keys [B, T, H, D]."""
        return hidden

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """The score, and a module whose call gives its params as a tuple, or None."""
        return Score(), None


def require_rotary(position: Position, mixer: str, heads: int, width: int) -> Position:
    """Returns the position if it rotates queries and keys or does nothing to them.

    Args:
        mixer: name of the mixer, for the message.
        width: channels of a head that are rotated.

    Raises:
        ValueError: the position shapes scores, or `width` is odd.
    """
    if width % 2:
        raise ValueError(
            f"mixer={mixer}: a position rotates pairs of channels, but {width} were given; choose"
            " an even number"
        )
    score, tables = position.score(heads, width)
    # an exact type: every subclass of Score adds something to the logits
    if type(score) is not Score or tables is not None:
        kind = type(position).__name__
        raise ValueError(
            f"mixer={mixer} needs a position that rotates queries and keys, but {kind} shapes"
            " scores; use position=rope"
        )
    return position
