"""Two layers with a memory, read row by row over lanes, on one device and over ranks: outputs and
all gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.block import ValueBlock, block
from models.carried_state import CarriedState, name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.memory.base import Memory
from models.span import PADDING, Span
from parallel.carried_state import ShardedCarriedState
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import GRID_HEADS, grid, relative
from tests.variants import VARIANTS, WIDTH

TOKENS, STEPS = 19, 4
LANES = [
    [8, 30, 1, 100],
    [45, 3, 2, 100],
]  # lengths of the documents of two lanes: they end, begin and go on anywhere
PADDED = 5  # tokens at the end of the first lane's third row


class Stack(nn.Module):
    """Two layers, with a norm before each mixer, as a decoder has them."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.blocks = nn.ModuleList(block(WIDTH, layer, SwiGLU(WIDTH, 8)) for layer in layers)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        values = None
        for each in self.blocks:
            if isinstance(each, ValueBlock):
                x, values = each(x, span, values)
            else:
                x = each(x, span)
        return x


def build(name: str, memory: Memory, dtype: torch.dtype = torch.float64, scale: float = 5.0) -> Any:
    """Two layers of a variant with weights `scale` times the initial ones, so that attention is far
    from even."""
    model = Stack([memory.around(VARIANTS[name]()) for _ in range(2)])
    name_stateful_modules(model)
    initialise(model, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale if parameter.dim() > 1 else 1)
    return model.to(dtype)


def lanes(lengths: list[list[int]], start: int, stop: int) -> Span:
    """Tokens start .. stop - 1 of each lane; documents are counted from the first token."""
    pos = torch.stack([torch.cat([torch.arange(n) for n in lane])[start:stop] for lane in lengths])
    doc = torch.stack(
        [
            torch.cat([torch.full((n,), i) for i, n in enumerate(lane)])[start:stop]
            for lane in lengths
        ]
    )
    return Span.of(pos.clone(), doc - doc[:, :1])


def row(step: int) -> Span:
    """The addresses of a row of both lanes; the third ends with padding, behind which no document
    goes on."""
    span = lanes(LANES, step * TOKENS, (step + 1) * TOKENS)
    if step == 2:
        span.doc[0, TOKENS - PADDED :] = PADDING
    if step == 3:
        span.pos[0] -= torch.where(span.doc[0] == 0, span.pos[0, 0].clone(), 0)
    return span


def content(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What comes in, and the weight of what goes out."""
    generator = torch.Generator().manual_seed(step)
    x, weight = (
        torch.randn(2, TOKENS, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return x, weight * row(step).valid()[..., None]


Read = tuple[
    Tensor, Tensor, dict[str, Tensor]
]  # output, gradient of what came in, gradients of parameters so far


def walk(
    model: nn.Module, past: CarriedState, cut: Callable[[Span], Span], dtype: torch.dtype
) -> list[Read]:
    """Read all rows, forward and backward; gradients of parameters add up."""
    found = []
    for step in range(STEPS):
        span, (x, weight) = cut(row(step)), content(step, dtype)
        x, weight = (
            t.clone() if span.sharding is None else span.sharding.shard(t, 0) for t in (x, weight)
        )
        out = model(x.requires_grad_(), past.attach(span))
        assert out.isfinite().all()
        (out * weight).sum().backward()
        past.advance()
        assert x.grad is not None
        found.append(
            (
                out.detach(),
                x.grad,
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
            )
        )
    return found


def compare(
    env: Any, make: Callable[[torch.dtype], nn.Module], method: str, policy: str, dtype: torch.dtype
) -> float:
    """Worst relative difference over all steps: outputs, gradients of inputs and of parameters."""
    want = walk(make(dtype), CarriedState(), lambda span: span, dtype)
    many, side = make(dtype), GRID_HEADS[env.size] if method == "usp" else 1
    communicator = apply_context_parallel(
        many, env.group, method, grid=grid(env, side) if method == "usp" else None
    )

    def cut(span: Span) -> Span:
        return shard_span(span, layouts(policy, span, env.size, heads=side), env.rank)

    worst = 0.0
    for step, (one, part) in enumerate(
        zip(want, walk(many, ShardedCarriedState(communicator), cut, dtype))
    ):
        here = cut(row(step))
        valid = here.valid()[..., None]
        for a, b in zip(part[:2], one[:2]):
            worst = max(worst, relative(a * valid, here.sharding.shard(b, 0) * valid))
        for name, grad in part[2].items():
            dist.all_reduce(grad, group=env.group)
            worst = max(worst, relative(grad, one[2][name]))
        assert set(part[2]) == set(one[2])
    return worst
