"""Stacks of experts, each rank holding its own: placed before anything else, so that engines and
checkpoints see shards.

A module whose class says `sharded_over_experts = True` has parameters [E, ...] only, one expert
after the other. Under expert parallelism each becomes a DTensor, Shard(0) over the mesh's expert
axis, and inside the module's forward its name stands for the plain local stack [E / ranks, ...].
Everywhere else it is the whole: names, shapes and weights as on one device.

Source: Lepikhin et al. 2020 (arXiv:2006.16668) for experts over ranks. Letters: E experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.layer import hook
from parallel.mesh import Mesh


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose parameters are stacks of experts."""
    return [module for module in model.modules() if hook(module, "sharded_over_experts")]


def unshared(model: nn.Module, ranks: int) -> list[str]:
    """Why `ranks` ranks cannot share this model's experts: one sentence for each fact; empty where
    they can."""
    stacks = [
        (name, module)
        for name, module in model.named_modules()
        if hook(module, "sharded_over_experts")
    ]
    if not stacks:
        return [
            f"parallel.experts={ranks}, but no layer of this model has experts; use"
            " parallel.experts=1, or a model that has them (model=switch)"
        ]
    counts = {len(p): name for name, module in reversed(stacks) for p in module.parameters()}
    return [
        f"parallel.experts={ranks} does not divide the {count} experts of {name}; use a divisor of"
        f" {count}"
        for count, name in counts.items()
        if count % ranks
    ]


def share_experts(model: nn.Module, mesh: Mesh, dtype: torch.dtype) -> list[nn.Module]:
    """Give every rank its experts, in place; does nothing where the mesh shares none.

    Args:
        model: on the meta device, or with equal weights on every rank.
        dtype: what the experts compute in; stacks stay as they are stored.

    Returns:
        The modules whose stacks are shared now.

    Raises:
        ValueError: as `unshared` says.
    """
    if mesh.experts_mesh is None:
        return []
    if reasons := unshared(model, mesh.experts.size):
        raise ValueError("\n".join(reasons))
    shared = experts_of(model)
    for module in shared:
        _share(module, mesh.experts_mesh["experts"])
        module.forward = _locally(module, module.forward, dtype)
    return shared


def _share(module: nn.Module, axis: DeviceMesh) -> None:
    """[E, ...] -> this rank's [E / ranks, ...] of each stack; nothing is sent."""
    assert not list(module.children()), "a module of expert stacks holds its stacks itself"
    for name, stack in list(module.named_parameters()):
        here = distribute_tensor(stack.detach(), axis, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(here, requires_grad=stack.requires_grad))


def _locally(module: nn.Module, forward: Callable, dtype: torch.dtype) -> Callable:
    """`forward`, for whose duration the module's stacks are plain local tensors; gradients reach
    the DTensors."""

    @torch.compiler.disable
    def local(*args: Any, **kwargs: Any) -> Any:
        stacks = {
            n: p.to_local()
            for n, p in module.named_parameters(recurse=False)
            if isinstance(p, DTensor)
        }
        shown = vars(module)  # what stands here is found before a parameter of that name
        shown.update({name: stack.to(dtype) for name, stack in stacks.items()})
        try:
            return forward(*args, **kwargs)
        finally:
            for name in stacks:
                del shown[name]

    return local


def even_dim(stack: nn.Parameter, ranks: int) -> int | None:
    """The first dim after the experts' that divides among `ranks`, or None."""
    return next((dim for dim in range(1, stack.dim()) if stack.shape[dim] % ranks == 0), None)
