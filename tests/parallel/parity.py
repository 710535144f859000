"""One mixer on one device against the same mixer cut over ranks: outputs and every gradient."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.init import initialise
from models.span import Span
from parallel.cut import cut_span
from parallel.layout import layouts
from parallel.spread import spread
from tests.variants import VARIANTS, WIDTH

LENGTHS = [[13, 1, 24, 9], [3, 40, 1, 1]]  # documents of two rows, uneven, one of a single token; the rest is padding
TOKENS = 51  # divides by nothing that the ranks might like
GRID_HEADS = {2: 2, 3: 1, 4: 2}  # under usp: ranks that trade heads, by number of ranks
GRIDS: dict[int, tuple] = {}  # of this rank's process, made once


def packed(lengths: list[list[int]] = LENGTHS, tokens: int = TOKENS) -> Span:
    """Rows of documents of these lengths, filled up with padding."""
    pos, doc = torch.zeros(len(lengths), tokens, dtype=torch.long), torch.full((len(lengths), tokens), -1)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            pos[row, start : start + size] = torch.arange(size)
            doc[row, start : start + size] = number
            start += size
    return Span.of(pos, doc)


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    return initialise(VARIANTS[name](), seed=1).to(dtype)


def grid(env: Any, side: int) -> tuple:
    """Groups (of ranks that trade heads, of the ring); the same ones for every case, because groups cost sockets."""
    if side not in GRIDS:
        rows = [list(range(r, r + side)) for r in range(0, env.size, side)]
        columns = [list(range(r, env.size, side)) for r in range(side)]
        made = [[(ranks, dist.new_group(ranks)) for ranks in some] for some in (rows, columns)]
        GRIDS[side] = tuple(next(group for ranks, group in some if env.rank in ranks) for some in made)
    return GRIDS[side]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the largest magnitude of what is wanted."""
    if not got.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


def compare(env: Any, name: str, method: str, policy: str, dtype: torch.dtype) -> float:
    """Worst relative difference over the output, the input's gradient and every parameter's gradient."""
    span = packed()
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    x, weight = x * 3, weight * span.valid()[..., None]

    one, many = build(name, dtype), build(name, dtype)
    names = list(many.state_dict())
    side = GRID_HEADS[env.size] if method == "usp" else 1
    spread(many, env.group, method, grid=grid(env, side) if method == "usp" else None)
    assert list(many.state_dict()) == names

    whole = x.clone().requires_grad_()
    want = one(whole, span)
    (want * weight).sum().backward()

    here = cut_span(span, layouts(policy, span, env.size, heads=side), env.rank)
    part = here.cut.shard(x, 0).requires_grad_()
    got = many(part, here)
    (got * here.cut.shard(weight, 0)).sum().backward()

    valid = here.valid()[..., None]
    shard = here.cut.shard
    worst = [relative(got * valid, shard(want.detach(), 0) * valid)]
    worst.append(relative(part.grad * valid, shard(whole.grad, 0) * valid))
    for (parameter, a), b in zip(one.named_parameters(), many.parameters(), strict=True):
        assert b.grad is not None, f"{parameter} has no gradient"
        dist.all_reduce(b.grad, group=env.group)
        worst.append(relative(b.grad, a.grad))
    return max(worst)
