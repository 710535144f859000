"""Position schemes: add to the embeddings, rotate queries and keys, or shape the scores."""

from torch import Tensor, nn

from models.scores import Score
from models.span import Span


class Position:
    """The parent of all schemes, and a scheme of its own: no positions at all (the mask alone gives
    the order).

    Source: Haviv et al. 2022 (arXiv:2203.16634); Kazemnejad et al. 2023 (arXiv:2305.19466).

    Attributes: max_length: longest document in tokens that the scheme can address, or None where
        there is no such limit.
    """

    max_length: int | None = None

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] that is added to the token embeddings, or None."""
        return None

    def rotate(self, x: Tensor, span: Span) -> Tensor:
        """Queries or keys [B, T, H, D] as they enter the scores."""
        return x

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """What becomes of the logits, and a module whose call gives the score's params (a tuple),
        or None."""
        return Score(), None


def require_rotary(position: Position, mixer: str, heads: int, width: int) -> Position:
    """The position, if it turns queries and keys or does nothing to them.

    Args:
        mixer: its name, for the message.
        width: channels of a head that the position is given.

    Raises:
        ValueError: the position shapes scores, or `width` channels do not fall into pairs.
    """
    if width % 2:
        raise ValueError(
            f"mixer={mixer}: a position turns pairs of channels, {width} were given; choose an even"
            " number"
        )
    score, tables = position.score(heads, width)
    if type(score) is not Score or tables is not None:
        kind = type(position).__name__
        raise ValueError(
            f"mixer={mixer} needs a position that turns queries and keys, {kind} shapes scores; use"
            " position=rope"
        )
    return position
