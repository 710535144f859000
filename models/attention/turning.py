"""Mixers that give a position only part of their channels need one that turns channels, and nothing else."""

from models.positions.position import Position
from models.scores import Score


def only_turns(position: Position, mixer: str, heads: int, width: int) -> Position:
    """The position, if it turns queries and keys or does nothing to them.

    Args:
        mixer: its name, for the message.
        width: channels of a head that the position is given.

    Raises:
        ValueError: the position shapes scores, or `width` channels do not fall into pairs.
    """
    if width % 2:
        raise ValueError(f"mixer={mixer}: a position turns pairs of channels, {width} were given; choose an even number")
    score, tables = position.score(heads, width)
    if type(score) is not Score or tables is not None:
        kind = type(position).__name__
        raise ValueError(f"mixer={mixer} needs a position that turns queries and keys, {kind} shapes scores; use position=rope")
    return position
