"""Splits heads or (row, head) units over ranks as evenly as possible."""

from parallel.collectives import HeadRange


def head_ranges(heads: int, ranks: int) -> list[HeadRange]:
    """Returns the range of query heads that each rank computes.

    Raises:
        ValueError: fewer heads than ranks.
    """
    if heads < ranks:
        raise ValueError(
            f"parallel.method=ulysses over {ranks} ranks needs {ranks} query heads, there are"
            f" {heads}; use ring"
        )
    return unit_ranges(heads, ranks)


def unit_ranges(count: int, ranks: int) -> list[tuple[int, int]]:
    """Returns for each rank the first of its units and the one after its last.

    With fewer units than ranks some ranges are empty.
    """
    edges = [rank * count // ranks for rank in range(ranks + 1)]
    return list(zip(edges[:-1], edges[1:]))
