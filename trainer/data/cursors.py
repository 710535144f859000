"""Whether a cursor that comes from a file is one that a stream can go on from: every field of its
kind and in its range."""

from typing import Any

LARGEST = 2**62  # of any number in a cursor: what is computed from it must not overflow
DEPTH = 100  # of the state of a reading library, which is its own to judge


def misfit(beginning: Any, cursor: Any, where: str = "cursor") -> str | None:
    """What tells a cursor from those of a stream, or None.

    Args:
        beginning: the cursor of the stream's first batch, whose keys and kinds every later one has;
            None in it stands for something of a library, plain data of any kind.
        cursor: what was read from the file.
    """
    if beginning is None:
        return _strange(cursor, where)
    if type(cursor) is not type(beginning):
        return f"{where} is a {type(cursor).__name__} and no {type(beginning).__name__}"
    if isinstance(beginning, dict):
        if beginning.keys() != cursor.keys():
            return (
                f"{where} has the keys {sorted(map(str, cursor))[:9]} and not {sorted(beginning)}"
            )
        pairs = [(beginning[key], cursor[key], f"{where}.{key}") for key in beginning]
    elif isinstance(beginning, list):
        if len(beginning) != len(cursor):
            return f"{where} has {len(cursor)} entries and not {len(beginning)}"
        pairs = [
            (one, other, f"{where}.{index}")
            for index, (one, other) in enumerate(zip(beginning, cursor))
        ]
    else:
        outside = isinstance(cursor, int) and not 0 <= cursor <= LARGEST
        return f"{where}={cursor} is out of range" if outside else None
    answers = (misfit(one, other, place) for one, other, place in pairs)
    return next((answer for answer in answers if answer), None)


def _strange(value: Any, where: str, depth: int = 0) -> str | None:
    """What a library's state holds that no data set gave, or None."""
    if value is None or isinstance(value, str | bool | float):
        return None
    if isinstance(value, int):
        return None if abs(value) <= LARGEST else f"{where} is out of range"
    if depth > DEPTH:
        return f"{where} is nested too deeply"
    below = value.items() if isinstance(value, dict) else enumerate(value)
    answers = (_strange(item, f"{where}.{key}", depth + 1) for key, item in below)
    return next((answer for answer in answers if answer), None)
