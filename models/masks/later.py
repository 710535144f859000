"""The keys of a row that queries still to come may see, decided by blocks of addresses.

Letters: S keys of one row.
"""

from collections.abc import Sequence

import numpy as np

from models.masks.algebra import EMPTY, FULL, Bounds, Mask

Fields = tuple[np.ndarray, np.ndarray, np.ndarray]  # (pos, doc, role), [S] each
BLOCKS = 64  # blocks of a row of keys below which they are kept or dropped together


def bounds_of(fields: Fields) -> Bounds:
    """The bounds of a set of tokens that is not empty."""
    pos, doc, role = fields
    return Bounds(
        int(pos.min()),
        int(pos.max()),
        int(doc.min()),
        int(doc.max()),
        int(role.min()),
        int(role.max()),
        False,
    )


def readable(mask: Mask, queries: Sequence[Bounds], fields: Fields) -> np.ndarray:
    """Returns [S] bool: False where no query within these bounds sees the key.

    A key that nobody sees may be called readable; one that somebody sees always is.

    Args:
        queries: bounds of all queries that are still to come.
        fields: addresses of the keys, without padding.
    """
    keep = np.zeros(len(fields[0]), dtype=bool)
    if len(keep) and queries:
        _mark(mask, queries, fields, (0, len(keep)), max(1, len(keep) // BLOCKS), keep)
    return keep


def _mark(
    mask: Mask,
    queries: Sequence[Bounds],
    fields: Fields,
    part: tuple[int, int],
    grain: int,
    keep: np.ndarray,
) -> None:
    """Marks the readable keys of one part, by halves down to `grain` keys."""
    start, stop = part
    pos, doc, role = (field[start:stop] for field in fields)
    keys = bounds_of((pos, doc, role))
    seen = max(mask.coverage(bounds, keys) for bounds in queries)
    if seen == EMPTY:
        return
    if seen == FULL or stop - start <= grain:
        keep[start:stop] = True
        return
    middle = (start + stop) // 2
    _mark(mask, queries, fields, (start, middle), grain, keep)
    _mark(mask, queries, fields, (middle, stop), grain, keep)
