"""One mixer on one device against the same mixer cut over ranks: outputs and every gradient."""

from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.init import initialise
from models.primitives.softmax import Softmax
from models.span import Span
from parallel.context_parallel import METHODS, apply_context_parallel
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.families import family
from tests.support.pool import ranks
from tests.variants import VARIANTS, WIDTH

LENGTHS = [
    [13, 1, 24, 9],
    [3, 40, 1, 1],
]  # documents of two rows, uneven, one of a single token; the rest is padding
TOKENS = 51  # divides by nothing that the ranks might like
SIZES = (2, 3, 4)  # numbers of ranks
OF_KIN = 3  # cases of a mixer whose kin meets them all
EXACT = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
}  # allowed difference, relative to the tensor's largest magnitude
GRID_HEADS = {2: 2, 3: 1, 4: 2}  # under usp: ranks that trade heads, by number of ranks
GRIDS: dict[int, tuple] = {}  # of this rank's process, made once


class Case(NamedTuple):
    """One mixer under one way of cutting."""

    name: str
    method: str
    policy: str
    size: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


@lru_cache(maxsize=1)
def methods_of() -> dict[str, tuple[str, ...]]:
    """Methods that each mixer knows: all where it has softmax attention, else the first alone.

    A method chooses the driver of a Softmax; every other primitive has a single driver.
    """
    methods = {}
    for name, make in VARIANTS.items():
        has_softmax = any(isinstance(module, Softmax) for module in make().modules())
        methods[name] = tuple(METHODS) if has_softmax else tuple(METHODS)[:1]
    return methods


def covering() -> list[Case]:
    """Covers each mixer with methods, layouts and numbers of ranks in turn.

    The first of a family meets each of its methods and every layout, the others three of them.
    Mixers of one kind meet all combinations together.
    """
    policies = list(POLICIES)
    cases = []
    met = set()
    for row, (name, methods) in enumerate(methods_of().items()):
        kin = family(f"mixer={name}")
        turns = OF_KIN if kin in met else max(len(methods), len(policies))
        met.add(kin)
        for turn in range(row, row + turns):
            method = methods[turn % len(methods)]
            policy = policies[(turn + row // len(methods)) % len(policies)]
            size = SIZES[(turn + row // 3) % len(SIZES)]
            cases.append(Case(name, method, policy, size))
    return cases


def everything() -> list[Case]:
    """Crosses every mixer with its methods, all layouts and all numbers of ranks."""
    cases = []
    for name, methods in methods_of().items():
        for method, policy, size in product(methods, POLICIES, SIZES):
            cases.append(Case(name, method, policy, size))
    return cases


def differences(case: Case) -> dict[torch.dtype, float]:
    """Worst relative difference of any rank, by dtype."""
    found = ranks(case.size, compare, *case[:3])
    return {dtype: max(each[dtype] for each in found) for dtype in EXACT}


def packed(lengths: list[list[int]] = LENGTHS, tokens: int = TOKENS) -> Span:
    """Rows of documents of these lengths, filled up with padding."""
    pos, doc = (
        torch.zeros(len(lengths), tokens, dtype=torch.long),
        torch.full((len(lengths), tokens), -1),
    )
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
    """Groups (of ranks that trade heads, of the ring); the same ones for every case, because groups
    cost sockets."""
    if side not in GRIDS:
        rows = [list(range(r, r + side)) for r in range(0, env.size, side)]
        columns = [list(range(r, env.size, side)) for r in range(side)]
        made = [[(ranks, dist.new_group(ranks)) for ranks in some] for some in (rows, columns)]
        GRIDS[side] = tuple(
            next(group for ranks, group in some if env.rank in ranks) for some in made
        )
    return GRIDS[side]


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference, in units of the largest magnitude of what is wanted."""
    if not got.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


@lru_cache(maxsize=2)
def given(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What comes in, and the weight of what goes out (none at padding)."""
    span, generator = packed(), torch.Generator().manual_seed(2)
    x, weight = (
        torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return x * 3, weight * span.valid()[..., None]


@lru_cache(maxsize=4)
def truth(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """On one device: the output, the input's gradient, and every parameter's."""
    x, weight = given(dtype)
    one, whole = build(name, dtype), x.clone().requires_grad_()
    want = one(whole, packed())
    (want * weight).sum().backward()
    assert whole.grad is not None
    return (
        want.detach(),
        whole.grad,
        {key: p.grad for key, p in one.named_parameters() if p.grad is not None},
    )


def compare(env: Any, name: str, method: str, policy: str) -> dict[torch.dtype, float]:
    """Worst relative difference over the output, the input's gradient and every parameter's
    gradient, by dtype."""
    return {dtype: max(compare_cut(env, name, method, policy, dtype).values()) for dtype in EXACT}


def compare_cut(
    env: Any,
    name: str,
    method: str,
    policy: str,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    *,
    change: Callable[[nn.Module], None] | None = None,
) -> dict[str, float]:
    """Differences of one cut, by what is compared.

    Args:
        change: is given the mixer once its context parallelism is applied.
        device: of the cut; not a CPU: it is compared with one CPU in float64.
    """
    wide = dtype if device == "cpu" else torch.float64
    (x, weight), (want, d_x, d_parameters) = given(wide), truth(name, wide)
    many, span = build(name, dtype).to(device), packed().map(lambda t: t.to(device))
    names, side = list(many.state_dict()), GRID_HEADS[env.size] if method == "usp" else 1
    apply_context_parallel(
        many, env.group, method, grid=grid(env, side) if method == "usp" else None
    )
    assert list(many.state_dict()) == names
    if change is not None:
        change(many)

    here = shard_span(span, layouts(policy, span, env.size, heads=side), env.rank)
    shard, valid = here.sharding.shard, here.valid().cpu()[..., None]
    part = shard(x, 0).to(device, dtype).requires_grad_()
    got = many(part, here)
    assert got.isfinite().all(), "outputs at padding are nobody's business, but finite"
    (got * shard(weight, 0).to(device, dtype)).sum().backward()
    assert part.grad is not None and part.grad.isfinite().all()

    d_part = part.grad.cpu()
    worst = {"output": relative(got.cpu() * valid, shard(want, 0) * valid)}
    worst["input"] = relative(d_part * valid, shard(d_x, 0) * valid)
    worst["padding"] = d_part.masked_select(~valid).abs().sum().item()
    for key, parameter in many.named_parameters():
        assert (parameter.grad is None) == (key not in d_parameters), f"{key} has no gradient"
        if parameter.grad is not None:
            gradient = parameter.grad.to("cpu", wide)
            dist.all_reduce(gradient, group=env.group)
            worst[key] = relative(gradient, d_parameters[key])
    return worst


def compare_on(
    env: Any,
    case: Case,
    device: str,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
) -> dict[str, float]:
    """Worst relative difference of this rank of a cut on a device, by dtype, from one CPU in
    float64; and of half precision without a cut, which is what rounding alone makes.

    All ranks may share the device: their group is gloo's.
    """
    alone = _one_device(case.name, torch.bfloat16, device)
    found = {"bfloat16 uncut": alone}
    for dtype in dtypes:
        worst = compare_cut(env, *case[:3], dtype, device)
        found[str(dtype).removeprefix("torch.")] = max(worst.values())
    return found


@lru_cache(maxsize=2)
def _one_device(name: str, dtype: torch.dtype, device: str) -> float:
    """Worst relative difference of the whole rows on a device from one CPU in float64."""
    (x, weight), (want, d_x, d_parameters) = given(torch.float64), truth(name, torch.float64)
    one, span = build(name, dtype).to(device), packed().map(lambda t: t.to(device))
    whole = x.to(device, dtype).requires_grad_()
    got = one(whole, span)
    (got * weight.to(device, dtype)).sum().backward()
    assert whole.grad is not None
    valid = packed().valid()[..., None]
    worst = [relative(got.cpu() * valid, want * valid), relative(whole.grad.cpu(), d_x)]
    for key, parameter in one.named_parameters():
        if parameter.grad is not None:
            worst.append(relative(parameter.grad.cpu(), d_parameters[key]))
    return max(worst)
