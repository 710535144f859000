"""Layouts of a row over ranks: per rank an ordered list of runs of the global token axis.

A pure function of (length, ranks, policy, documents): every rank works it out for itself, nobody
sends it. Any length works: the axis is filled up with padding until every rank holds the same
number of tokens, and nothing is ever truncated.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from models.masks.algebra import Mask
from models.span import Span, to_device
from parallel.load_balance import assign_chunks, chunk_tokens, chunk_work, visible_keys

Interval = tuple[int, int]  # start and stop on the global token axis


@dataclass(frozen=True)
class Layout:
    """Assignment of the tokens of a row to ranks.

    Attributes:
        runs: for each rank its runs, in the order in which they lie in its memory.
        tokens: length of the row before padding.
    """

    runs: tuple[tuple[Interval, ...], ...]
    tokens: int

    @property
    def ranks(self) -> int:
        return len(self.runs)

    @property
    def tokens_per_rank(self) -> int:
        """Tokens on every rank, padding among them."""
        return sum(stop - start for start, stop in self.runs[0])

    @property
    def length(self) -> int:
        """Tokens of the whole axis, padding among them."""
        return self.tokens_per_rank * self.ranks

    def split(self, parts: int) -> "Layout":
        """Cut what each rank holds, in the order of its memory, over `parts` ranks that follow one
        another."""
        if parts == 1:
            return self
        each = self.tokens_per_rank // parts
        assert each * parts == self.tokens_per_rank, "the policy was not told of the step"
        return Layout(
            tuple(_slice(runs, i * each, each) for runs in self.runs for i in range(parts)),
            self.tokens,
        )

    def grouped(self, parts: int) -> "Layout":
        """The way back: what each `parts` ranks that follow one another hold together."""
        groups = range(0, self.ranks, parts)
        return Layout(
            tuple(tuple(_joined(sum(self.runs[g : g + parts], ()))) for g in groups), self.tokens
        )

    def join(self, other: "Layout") -> "Layout":
        """Two rows as one: this one's tokens, then the other's, then the padding of both; a rank
        holds both its parts."""
        middle = self.tokens
        end = self.tokens + other.tokens
        runs = (
            (
                *_placed(a, self.tokens, 0, end),
                *_placed(b, other.tokens, middle, end + self.length - self.tokens),
            )
            for a, b in zip(self.runs, other.runs, strict=True)
        )
        return Layout(tuple(runs), end)

    def index(self, rank: int) -> Tensor:
        """[each] int64: the global index of every token on `rank`."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.runs[rank]])

    def order(self) -> Tensor:
        """[length] int64: where, in the ranks' tokens laid end to end, each global token is
        found."""
        return torch.cat([self.index(rank) for rank in range(self.ranks)]).argsort()

    def shard(self, x: Tensor, rank: int, fill: float) -> Tensor:
        """[tokens, ...] -> [each, ...]: the tokens of `rank`, with `fill` where there are none."""
        index = to_device(self.index(rank), x.device)
        if self.length == self.tokens:
            return x[index]
        padding = x.new_full((self.length - self.tokens, *x.shape[1:]), fill)
        return torch.cat([x, padding])[index]

    def unshard(self, parts: list[Tensor]) -> Tensor:
        """Every rank's [each, ...] -> [tokens, ...]: the row as it was."""
        return torch.cat(parts)[self.order().to(parts[0].device)][: self.tokens]


def contiguous(tokens: int, ranks: int, step: int = 1) -> Layout:
    """Rank r holds the r-th stretch. Simple; under a causal mask the last rank works hardest."""
    each = _up(-(-tokens // ranks), step)
    return Layout(tuple(((r * each, (r + 1) * each),) for r in range(ranks)), tokens)


def zigzag(tokens: int, ranks: int, step: int = 1) -> Layout:
    """Rank r of N holds stretches r and 2N-1-r of 2N, so that under a causal mask all ranks see as
    many keys.

    Source: Zhu 2024, ring-flash-attention; Llama 3 (arXiv:2407.21783, section 3.3.2).
    """
    side = _up(-(-tokens // (2 * ranks)), step)
    held = [(r, 2 * ranks - 1 - r) if ranks > 1 else (0, 1) for r in range(ranks)]
    return Layout(tuple(tuple((i * side, (i + 1) * side) for i in pair) for pair in held), tokens)


def balanced(tokens: int, ranks: int, step: int = 1, keys: Tensor | None = None) -> Layout:
    """Every rank holds as many small chunks as any other, dealt so that all see as many keys.

    Args:
        keys: [tokens] int64, keys that each token sees; by default one causal document.
    """
    side = chunk_tokens(tokens, ranks, step)
    chunks = _up(-(-tokens // side), ranks)
    work = chunk_work(torch.arange(1, tokens + 1) if keys is None else keys, side, chunks)
    held = [[(c * side, (c + 1) * side) for c in mine] for mine in assign_chunks(work, ranks)]
    return Layout(tuple(tuple(_joined(runs)) for runs in held), tokens)


def _slice(runs: Sequence[Interval], skip: int, size: int) -> tuple[Interval, ...]:
    """The runs of `size` tokens after the first `skip`."""
    out: list[Interval] = []
    for start, stop in runs:
        a = start + min(skip, stop - start)
        b = stop
        skip -= a - start
        b = min(b, a + size)
        size -= b - a
        if a < b:
            out.append((a, b))
    return tuple(out)


def _placed(runs: Sequence[Interval], tokens: int, first: int, spare: int) -> list[Interval]:
    """Runs of a row of `tokens` that now begins at `first`, with its padding from `spare` on."""
    out: list[Interval] = []
    for start, stop in runs:
        edge = min(max(start, tokens), stop)
        both = (start + first, edge + first), (edge - tokens + spare, stop - tokens + spare)
        out += [(a, b) for a, b in both if a < b]
    return out


def _up(size: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-size // step) * step


def _joined(runs: Sequence[Interval]) -> list[Interval]:
    """Runs with neighbours made one."""
    out: list[Interval] = []
    for start, stop in runs:
        if out and out[-1][1] == start:
            out[-1] = out[-1][0], stop
        else:
            out.append((start, stop))
    return out


POLICIES: dict[str, Callable[..., Layout]] = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "balanced": balanced,
}


def _policy(policy: str) -> Callable[..., Layout]:
    if policy not in POLICIES:
        raise ValueError(f"unknown parallel.layout={policy}; choose one of {', '.join(POLICIES)}")
    return POLICIES[policy]


@lru_cache(maxsize=64)
def layout(policy: str, tokens: int, ranks: int, heads: int = 1) -> Layout:
    """The layout of that name for any row; `balanced` takes the row for one causal document, see
    `layouts`.

    Args:
        heads: ranks among which heads are divided (USP): the row is cut over the ranks / heads of
            the ring, and each of those parts once more over the ranks that trade heads.

    Raises:
        ValueError: no layout of that name, or heads that do not divide the ranks.
    """
    return _gridded(_policy(policy), tokens, ranks, heads)


def layouts(
    policy: str, span: Span, ranks: int, *, heads: int = 1, mask: Mask | None = None
) -> list[Layout]:
    """Returns the layouts of these rows: one for all, or under `balanced` one for each row.

    Args:
        span: [B, T] addresses of the whole rows, the same on every rank.
        mask: whose visible keys are balanced; causal within documents by default.
    """
    if policy != "balanced":
        return [layout(policy, span.shape[1], ranks, heads)]
    keys = visible_keys(span, mask)
    return [_gridded(balanced, span.shape[1], ranks, heads, keys=row) for row in keys]


def _gridded(
    policy: Callable[..., Layout], tokens: int, ranks: int, heads: int, **rest: Tensor
) -> Layout:
    if ranks % heads:
        raise ValueError(
            f"parallel.ulysses={heads} does not divide the {ranks} ranks that share a sequence; use"
            " a divisor"
        )
    return policy(tokens, ranks // heads, heads, **rest).split(heads)
