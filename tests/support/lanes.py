"""Rows of two lanes in which documents end, begin and go on; a mixer with a memory on one device
and cut over ranks."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.carried_state import CarriedState, name_stateful_modules
from models.init import initialise
from models.span import PADDING, Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import GRID_HEADS, grid, relative

TOKENS, WIDTH = 17, 16
# for each step and lane (first position, tokens) of every document; the rest of a row is padding
ROWS = [
    [[(0, 5), (0, 12)], [(0, 17)]],
    [[(12, 17)], [(17, 10), (0, 1), (0, 6)]],
    [[(29, 2), (0, 3)], [(6, 17)]],
    [[(0, 17)], [(23, 9), (0, 4)]],
]

Build = Callable[[], nn.Module]


def span(step: int) -> Span:
    """The addresses of a row of both lanes."""
    pos, doc = torch.zeros(2, TOKENS, dtype=torch.long), torch.full((2, TOKENS), PADDING)
    for lane, documents in enumerate(ROWS[step]):
        begin = 0
        for number, (first, tokens) in enumerate(documents):
            pos[lane, begin : begin + tokens] = torch.arange(first, first + tokens)
            doc[lane, begin : begin + tokens] = number
            begin += tokens
    return Span.of(pos, doc)


def given(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What comes in, and the weight of what goes out (none at padding)."""
    generator = torch.Generator().manual_seed(step)
    x, weight = (
        torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return x * 3, weight * span(step).valid()[..., None]


def made(build: Build, dtype: torch.dtype) -> nn.Module:
    """The mixer, its parameters spread out, so that nothing is zero or equal by chance; its
    carriers named."""
    model = initialise(build(), seed=1).to(dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(
                parameter.shape,
                generator=torch.Generator().manual_seed(number),
                dtype=torch.float64,
            )
            parameter.add_(noise.to(dtype) * 0.2)
    name_stateful_modules(model)
    return model


Row = tuple[Tensor, Tensor, dict[str, Tensor]]  # output, the input's gradient, every parameter's


@lru_cache(maxsize=8)
def truth(build: Build, dtype: torch.dtype) -> tuple[list[Row], dict[str, Tensor]]:
    """On one device: what each row gives, and what is kept at the end."""
    model, past, found = made(build, dtype), CarriedState(), []
    for step in range(len(ROWS)):
        x, weight = given(step, dtype)
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        out = model(leaf, past.attach(span(step)))
        (out * weight).sum().backward()
        past.advance()
        grads = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
        assert leaf.grad is not None
        found.append((out.detach(), leaf.grad, grads))
    return found, past.export_state()


def compare(
    env: Any, build: Build, method: str, policy: str, dtype: torch.dtype
) -> dict[str, float]:
    """Worst relative difference over all rows of output, the input's and all parameters' gradients,
    and of what is kept."""
    want, kept = truth(build, dtype)
    model, past, worst = (
        made(build, dtype),
        ShardedCarriedState(Communicator(env.group)),
        {"none": 0.0},
    )
    side = GRID_HEADS[env.size] if method == "usp" else 1
    apply_context_parallel(
        model, env.group, method, grid=grid(env, side) if method == "usp" else None
    )

    def note(key: str, value: float) -> None:
        assert value == value, f"{key} is not a number"
        worst[key] = max(worst.get(key, 0.0), value)

    for step, (out, d_x, grads) in enumerate(want):
        x, weight = given(step, dtype)
        here = shard_span(span(step), layouts(policy, span(step), env.size, heads=side), env.rank)
        shard, valid = here.sharding.shard, here.valid()[..., None]
        part = shard(x, 0).requires_grad_()
        model.zero_grad()
        got = model(part, past.attach(here))
        assert got.isfinite().all(), "outputs at padding are nobody's business, but finite"
        (got * shard(weight, 0)).sum().backward()
        past.advance()
        assert part.grad is not None and part.grad.isfinite().all()
        note("output", relative(got * valid, shard(out, 0) * valid))
        note("input", relative(part.grad * valid, shard(d_x, 0) * valid))
        for key, parameter in model.named_parameters():
            assert (parameter.grad is None) == (key not in grads), f"{key} has no gradient"
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=env.group)
                note(key, relative(parameter.grad, grads[key]))
    whole = past.export_state()
    assert set(whole) == set(kept)
    for key, value in whole.items():
        note(key, relative(value.double(), kept[key].double()))
    return worst


def poisoned(env: Any, build: Build, policy: str) -> float:
    """Worst relative difference in healthy documents, output and the input's gradient, when one is
    not a number.

    It ends in the second row, so that nothing of it may be left for the third, and other documents
    follow it at once.
    """
    one, many = made(build, torch.float64), made(build, torch.float64)
    apply_context_parallel(many, env.group)
    pasts, worst = (CarriedState(), ShardedCarriedState(Communicator(env.group))), 0.0
    for step in range(3):
        x, weight = given(step, torch.float64)
        sick = torch.zeros(2, TOKENS, 1, dtype=torch.bool)
        sick[1] |= step < 2 and (torch.arange(TOKENS) < (TOKENS, 10)[step])[:, None]
        weight = weight.masked_fill(sick, 0)
        here = shard_span(span(step), layouts(policy, span(step), env.size), env.rank)
        whole, part = (
            x.requires_grad_(),
            here.sharding.shard(x.detach().masked_fill(sick, torch.nan), 0).requires_grad_(),
        )
        healthy = here.sharding.shard(
            (span(step).valid()[..., None] & ~sick).expand_as(x), 0
        ).bool()
        want, got = one(whole, pasts[0].attach(span(step))), many(part, pasts[1].attach(here))
        (want * weight).sum().backward()
        torch.where(healthy, got * here.sharding.shard(weight, 0), 0).sum().backward()
        for past in pasts:
            past.advance()
        assert whole.grad is not None and part.grad is not None
        for a, b in ((got, want), (part.grad, whole.grad)):
            if healthy.any():
                worst = max(worst, relative(a[healthy], here.sharding.shard(b, 0)[healthy]))
                assert a[healthy].isfinite().all()
    return worst
