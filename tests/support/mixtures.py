"""One layer of experts on one device against the same layer with its tokens and its experts over
ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.auxiliary import auxiliary_loss, on_step_begin, on_step_end, statistics
from models.init import initialise
from models.moe.switch import Switch
from models.moe.topk import TopKMixture
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.mesh import Mesh, build_mesh
from parallel.sharding import shard_span
from tests.support.parity import packed, relative

WIDTH, HIDDEN, EXPERTS = 12, 10, 12
LENGTHS = [
    [13, 1, 24, 9],
    [3, 40, 1, 1],
    [51],
    [1],
    [],
    [20, 20],
    [7, 7, 7, 7, 7, 7],
    [30],
]  # rows; some padding, one all
MESHES: dict[tuple, Mesh] = {}  # of this rank's process: groups cost sockets

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "switch": lambda: Switch(
        WIDTH, HIDDEN, 1, 4, 5, experts=EXPERTS, capacity_factor=1.1, jitter=0.1
    ),
    "switch over rows": lambda: Switch(
        WIDTH, HIDDEN, experts=EXPERTS, capacity_factor=0.7, capacity_over="row"
    ),
    "switch without drops": lambda: Switch(
        WIDTH, HIDDEN, experts=EXPERTS, capacity_factor=None, activation="relu"
    ),
    "switch with dropout": lambda: Switch(
        WIDTH, HIDDEN, 2, experts=EXPERTS, expert_dropout=0.4, jitter=0.0
    ),
    "undecided switch": lambda: Switch(WIDTH, HIDDEN, experts=EXPERTS, capacity_factor=None),
    "undecided top 2": lambda: TopKMixture(WIDTH, HIDDEN, experts=EXPERTS, top=2, balance=0.1),
    "top 2": lambda: TopKMixture(
        WIDTH, HIDDEN, experts=EXPERTS, top=2, balance=0.1, z=0.1, expert_dropout=0.2
    ),
    "top 3, biased": lambda: TopKMixture(
        WIDTH,
        HIDDEN,
        experts=EXPERTS,
        top=3,
        shared=1,
        hidden=5,
        score="sigmoid",
        bias_speed=0.1,
        scaling=2.5,
    ),
    "top 3 in groups": lambda: TopKMixture(
        WIDTH,
        HIDDEN,
        experts=EXPERTS,
        top=3,
        score="sigmoid",
        normalised=False,
        choice_bias=True,
        groups=4,
        top_groups=2,
        router_bias=True,
        expert_bias=True,
        activation="clamped_swiglu",
    ),
}


def built(name: str, dtype: torch.dtype) -> Any:
    """With weights large enough that tokens differ in their choice, and as it is in step 3."""
    layer: Any = initialise(LAYERS[name](), seed=1).to(dtype)
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if key.endswith("bias"):
                generator = torch.Generator().manual_seed(len(key))
                parameter += torch.randn(parameter.shape, generator=generator, dtype=dtype) / 30
            parameter *= 300 if key == "router.weight" and isinstance(layer, Switch) else 30
        if name.startswith("undecided"):
            layer.router.weight.zero_()  # equal scores: of equals the first
    on_step_begin(layer, 3)
    return layer


def given(dtype: torch.dtype, lengths: list[list[int]]) -> tuple[Tensor, Tensor]:
    """What comes in, and the weight of what goes out (none at padding)."""
    span, generator = packed(lengths), torch.Generator().manual_seed(2)
    x, weight = (
        torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for _ in range(2)
    )
    return x, weight * span.valid()[..., None]


def passed(
    layer: nn.Module, x: Tensor, weight: Tensor, span: Span
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Forward and backward of output and own losses: (output, those losses, statistics)."""
    out = layer(x, span)
    losses = auxiliary_loss(layer)
    loss = (out * weight).sum() + sum(losses.values(), torch.zeros((), dtype=x.dtype))
    loss.backward()
    return out.detach(), {name: v.detach() for name, v in losses.items()}, statistics(layer)


def compare(
    env: Any,
    name: str,
    context: int,
    experts: int,
    policy: str,
    dtype: torch.dtype,
    lengths: list[list[int]] = LENGTHS,
) -> dict[str, float]:
    """Worst relative difference by what is compared; `env.size` ranks, `context` of them share a
    row."""
    (x, weight), span = given(dtype, lengths), packed(lengths)
    one, whole = built(name, dtype), x.clone().requires_grad_()
    want, want_losses, want_sums = passed(one, whole, weight, span)
    assert whole.grad is not None

    data = env.size // context
    mesh = MESHES.setdefault((env.size, context, experts), None) or build_mesh(
        context, data, experts=experts
    )  # type: ignore
    MESHES[env.size, context, experts] = mesh
    many = built(name, dtype)
    held = EXPERTS // experts
    mine = slice(mesh.experts.rank * held, (mesh.experts.rank + 1) * held)
    for key, stack in list(many.experts.named_parameters()):
        setattr(many.experts, key, nn.Parameter(stack.detach()[mine].clone()))
    group = mesh.context.group if context > 1 else None
    communicator = (
        apply_context_parallel(many, group, "ring", experts=mesh.experts.group)
        if experts > 1 or group is not None
        else None
    )

    rows = slice(mesh.data.rank * len(lengths) // data, (mesh.data.rank + 1) * len(lengths) // data)
    here, share = span.map(lambda t: t[rows]), lambda t: t[rows]
    if context > 1:
        here = shard_span(here, layouts(policy, here, context), mesh.context.rank)
        share = lambda t: here.sharding.shard(t[rows], 0)  # noqa: E731
    part, valid = share(x).clone().requires_grad_(), here.valid()[..., None]
    got, losses, sums = passed(many, part, share(weight), here)
    assert part.grad is not None and got.isfinite().all()

    worst = {
        "output": relative(got * valid, share(want) * valid),
        "input": relative(part.grad, share(whole.grad)),
    }
    for found, wanted in ((losses, want_losses), (sums, want_sums)):
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            dist.all_reduce(value)
            worst[key] = relative(value, wanted[key])
    for key, parameter in many.named_parameters():
        grad, wanted = parameter.grad, one.get_parameter(key).grad
        assert grad is not None and wanted is not None
        if key.startswith("experts."):
            full = torch.zeros_like(wanted)
            full[mine] = grad
            grad = full
        dist.all_reduce(grad)
        worst[key] = relative(grad, wanted)
    told, wanted = on_step_end(many, sums), on_step_end(one, want_sums)
    assert told.keys() == wanted.keys()
    worst["figures"] = max(abs(told[key] - wanted[key]) for key in wanted)
    for (key, mine_), (_, theirs) in zip(many.named_buffers(), one.named_buffers(), strict=True):
        worst[f"buffer {key}"] = float(not torch.equal(mine_, theirs))
    assert communicator is None or experts == 1 or "visits" in communicator.bytes_sent
    return worst
