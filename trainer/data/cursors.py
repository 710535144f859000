"""Validation of a cursor that comes from a file: every field of its type and in its range."""

import math
from typing import Any

LARGEST = 2**62  # of any number in a cursor: sums of two must not overflow int64
DEPTH = 100  # of the state of a reading library, which alone can judge its contents


def misfit(beginning: Any, cursor: Any, where: str = "cursor") -> str | None:
    """Describes how a cursor differs from those of a stream, or returns None.

    Args:
        beginning: the cursor of the stream's first batch, whose keys and types all later ones have;
            None in it stands for the state of a library, which is plain data of any type.
        cursor: as read from the file.
        where: name of the field, for the message.
    """
    if beginning is None:
        return _library_misfit(cursor, where)
    if type(cursor) is not type(beginning):
        return f"{where} is a {type(cursor).__name__} and no {type(beginning).__name__}"
    if isinstance(beginning, dict):
        if beginning.keys() != cursor.keys():
            # A foreign file may have any number of keys; nine show what it is.
            keys = sorted(map(str, cursor))[:9]
            return f"{where} has the keys {keys} and not {sorted(beginning)}"
        fields = list(beginning)
    elif isinstance(beginning, list):
        if len(beginning) != len(cursor):
            return f"{where} has {len(cursor)} entries and not {len(beginning)}"
        fields = list(range(len(beginning)))
    else:
        if isinstance(cursor, int) and not 0 <= cursor <= LARGEST:
            return f"{where}={cursor} is out of range"
        if isinstance(cursor, float) and not math.isfinite(cursor):
            return f"{where}={cursor} is no finite number"
        return None
    for field in fields:
        message = misfit(beginning[field], cursor[field], f"{where}.{field}")
        if message:
            return message
    return None


def _library_misfit(value: Any, where: str, depth: int = 0) -> str | None:
    """Describes what a library's state holds beyond plain data, or returns None."""
    if value is None or isinstance(value, str | bool | float):
        return None
    if isinstance(value, int):
        return None if abs(value) <= LARGEST else f"{where} is out of range"
    # Python's own limit would end the run with a traceback.
    if depth > DEPTH:
        return f"{where} is nested too deeply"
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        message = _library_misfit(item, f"{where}.{key}", depth + 1)
        if message:
            return message
    return None
