"""Splits heads or (row, head) units over ranks as evenly as possible."""

from parallel.collectives import HeadRange as Share


def head_ranges(heads: int, ranks: int) -> list[Share]:
    """For each rank the query heads it computes: as equal as can be.

    Raises:
        ValueError: fewer heads than ranks.
    """
    if heads < ranks:
        raise ValueError(
            f"parallel.method=ulysses over {ranks} ranks needs {ranks} query heads, there are"
            f" {heads}; use ring"
        )
    edges = [r * heads // ranks for r in range(ranks + 1)]
    return list(zip(edges[:-1], edges[1:]))


def unit_ranges(count: int, ranks: int) -> list[tuple[int, int]]:
    """For each rank the first and the one after the last of `count` things, as equal as can be;
    some may get none."""
    edges = [r * count // ranks for r in range(ranks + 1)]
    return list(zip(edges[:-1], edges[1:]))
