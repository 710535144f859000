"""Communication volume of each attention method, and the choice made by method=auto.

The formulas are exact: a test holds them equal to what the communicator
counts. Bytes are those that one rank sends in one layer.
Rules of choice: a mask that needs less than half of the other ranks' keys fetches those; otherwise
heads are traded where they divide among the ranks and that sends less than the ring; otherwise a
grid of both, or the ring, whichever sends less.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from parallel.partition import head_ranges

FEW = 0.5  # a fetch of less than this part of all remote keys beats sending them all


class Traffic(NamedTuple):
    """Bytes sent by one rank."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: tuple) -> "Traffic":
        return Traffic(self.forward + other[0], self.backward + other[1])


class TensorSpec(NamedTuple):
    """One tensor of a token: elements of a head (or of the whole, where heads is None), heads,
    bytes of an element."""

    width: int
    heads: int | None
    size: int

    @property
    def token(self) -> int:
        """Bytes of one token."""
        return self.width * (self.heads or 1) * self.size

    @property
    def token_wide(self) -> int:
        """Bytes of one token's gradient: float32, or float64 where the tensor is."""
        return self.width * (self.heads or 1) * max(4, self.size)


@dataclass(frozen=True)
class AttentionShape:
    """One attention as one rank sees it.

    Attributes: tokens, source: queries and keys on a rank, over all rows. query, payload: what a
        token carries. mean: what comes out of it; its heads are those that are traded.
    """

    tokens: int
    source: int
    query: tuple[TensorSpec, ...]
    payload: tuple[TensorSpec, ...]
    mean: TensorSpec


def tensor_spec(x: Tensor, dim: int | None) -> TensorSpec:
    """The stream of a tensor [B, T, ...] whose dim `dim` counts heads."""
    elements = x.shape[2:].numel()
    heads = None if dim is None else x.shape[dim]
    return TensorSpec(elements // (heads or 1), heads, x.element_size())


def ring_traffic(job: AttentionShape, ranks: int) -> Traffic:
    """Keys go round twice; their gradients once, in float32, and a rank's own keys come last."""
    keys, wide = (
        job.source * sum(each)
        for each in ([s.token for s in job.payload], [s.token_wide for s in job.payload])
    )
    return Traffic((ranks - 1) * keys, (ranks - 1) * (keys + wide))


def allgather_traffic(
    job: AttentionShape, gives: Sequence[int], takes: Sequence[int], rank: int
) -> Traffic:
    """Needed keys go out twice, and the gradients of what was taken go home in float32.

    Args:
        gives, takes: keys that go to, and come from, each rank; those of `rank` stay.
    """
    out = sum(gives) - gives[rank]
    back = sum(takes) - takes[rank]
    keys = sum(s.token for s in job.payload)
    wide = sum(s.token_wide for s in job.payload)
    return Traffic(out * keys, out * keys + back * wide)


def ulysses_traffic(job: AttentionShape, ranks: int, rank: int = 0) -> Traffic:
    """Each token goes out with the heads that others compute, and comes back as a mean; backward
    the other way."""
    mine = head_ranges(job.mean.heads or 1, ranks)

    def share(s: TensorSpec, other: int) -> int:
        """Bytes of the heads of a token that `other` needs."""
        if s.heads is None:
            return s.token
        a, b = mine[other]
        group = (job.mean.heads or 1) // s.heads
        return ((b - 1) // group + 1 - a // group) * s.width * s.size

    others = [r for r in range(ranks) if r != rank]
    there = sum(n * share(s, r) for n, some in _both(job) for s in some for r in others)
    home = (ranks - 1) * job.tokens * share(job.mean, rank)
    back = sum(n * share(s, rank) for n, some in _both(job) for s in some) * (ranks - 1)
    return Traffic(there + home, job.tokens * sum(share(job.mean, r) for r in others) + back)


def _both(job: AttentionShape) -> tuple[tuple[int, tuple[TensorSpec, ...]], ...]:
    return (job.tokens, job.query), (job.source, job.payload)


def usp_traffic(job: AttentionShape, inner: int, outer: int, rank: int = 0) -> Traffic:
    """Heads among `inner` ranks, then a ring over `outer` groups of what a rank of the group then
    holds."""
    total = job.mean.heads or 1
    a, b = head_ranges(total, inner)[rank]
    reads = {
        s.heads: [head * s.heads // total for head in range(a, b)]
        for s in job.payload
        if s.heads is not None
    }
    counts = {heads: len(set(read)) for heads, read in reads.items()}
    even = all(
        read == sorted(sorted(set(read)) * ((b - a) // counts[heads]))
        for heads, read in reads.items()
    )
    if (
        not even or len(set(counts.values())) > 1
    ):  # each query head then gets a copy of the key head that it reads
        counts = dict.fromkeys(counts, b - a)
    payload = tuple(
        s if s.heads is None else s._replace(heads=counts[s.heads]) for s in job.payload
    )
    return ulysses_traffic(job, inner, rank) + ring_traffic(
        replace(job, source=job.source * inner, payload=payload), outer
    )


def grids(ranks: int, count: int) -> list[int]:
    """Numbers of ranks that `count` heads divide among, leaving a ring of at least two."""
    return [n for n in range(2, ranks) if ranks % n == 0 and count % n == 0]


def choose_method(
    job: AttentionShape, ranks: int, share: float, *, trade: bool = True, grid: int | None = None
) -> tuple[str, int, str]:
    """The way to share one attention: (method, ranks that trade heads, why).

    Args:
        share: part of the other ranks' keys that the mask needs, on the rank that needs most.
        trade: whether the score's heads may be traded at all.
        grid: ranks that trade heads in the only grid there is; None where any may be made.
    """
    count = job.mean.heads or 1
    around = ring_traffic(job, ranks)
    if share < FEW:
        return "allgather", 1, f"its mask needs {share:.0%} of the other ranks' keys"
    if not trade:
        return "ring", 1, "its heads cannot be traded"
    if count % ranks == 0 and (traded := ulysses_traffic(job, ranks)).total < around.total:
        return (
            "ulysses",
            ranks,
            f"{count} heads divide among {ranks} ranks, {_against(traded, around)}",
        )
    able = [
        n for n in (grids(ranks, count) if grid is None else [grid]) if n in grids(ranks, count)
    ]
    best = min(able, key=lambda n: usp_traffic(job, n, ranks // n).total, default=0)
    if best and (crossed := usp_traffic(job, best, ranks // best)).total < around.total:
        return (
            "usp",
            best,
            f"heads over {best} ranks x ring of {ranks // best}, {_against(crossed, around)}",
        )
    few = "and would send more" if count % ranks == 0 else f"do not divide among {ranks} ranks"
    return (
        "ring",
        1,
        (
            f"{around.total / 1e6:.3g} MB sent; its {count} heads"
            f" {'divide ' if count % ranks == 0 else ''}{few}"
        ),
    )


def _against(a: Traffic, b: Traffic) -> str:
    return f"{a.total / 1e6:.3g} MB sent where the ring sends {b.total / 1e6:.3g}"
