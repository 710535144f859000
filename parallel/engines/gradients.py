"""Sum gradients over ranks, measure them and clip them.

A gradient is whole (the same on every rank after `add_up`), or that of the experts of a rank (a
DTensor, the same on all ranks that hold these experts), or sharded by FSDP2 (a DTensor whose shards
are disjoint). The norm counts every element of every parameter once: squares of shards are summed
over the mesh that shards them, mesh by mesh, then combined.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from parallel.engines.materialize import local_tensor

BUCKET_BYTES = 25 * 2**20


def all_reduce_gradients(
    parameters: Sequence[nn.Parameter],
    group: ProcessGroup | None,
    holders: ProcessGroup | None = None,
) -> None:
    """Replace each gradient by its sum over the group; all ranks that hold it end with the same
    bits.

    Args:
        group: all ranks; they sum what is whole.
        holders: the ranks that hold the same experts as this one; they sum what is a DTensor.

    A parameter that got a gradient on some ranks only counts as zero on the others; one that got
    none anywhere keeps None, so that the optimiser leaves it alone on any number of ranks.
    """
    if group is None or dist.get_world_size(group) == 1 or not parameters:
        return
    used = used_anywhere([p.grad is not None for p in parameters], group)
    for parameter, somewhere in zip(parameters, used, strict=True):
        if somewhere and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = {p: p.grad for p in parameters if p.grad is not None}
    whole = {p: grad for p, grad in grads.items() if not isinstance(grad, DTensor)}
    # A part of what was sent takes the place of the gradient: nothing is copied back.
    for parameter, summed in zip(whole, _summed(list(whole.values()), group), strict=True):
        parameter.grad = summed
    if holders is not None:
        shards = [local_tensor(grad) for grad in grads.values() if isinstance(grad, DTensor)]
        for shard, summed in zip(shards, _summed(shards, holders), strict=True):
            shard.copy_(summed)


def used_anywhere(here: Sequence[bool], group: ProcessGroup | None) -> list[bool]:
    """Of parameters that got a gradient here or not, whether they got one on some rank; all ranks
    must call.

    The flags go from host to host: on a device the answer would wait for its backward pass.
    """
    if group is None or dist.get_world_size(group) == 1 or not here:
        return list(here)
    used = torch.tensor([float(flag) for flag in here])
    dist.all_reduce(used, op=dist.ReduceOp.MAX, group=group)  # [parameters] -> [parameters]
    return [flag > 0 for flag in used.tolist()]


def _summed(tensors: Sequence[Tensor], group: ProcessGroup) -> Iterator[Tensor]:
    """Yields the sum over the group of each tensor, with its strides; it may lie in its memory."""
    for bucket in buckets(tensors):
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        flat = bucket[0].view(-1) if alone else torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat, group=group)  # [elements] -> [elements]
        for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
            as_it_was = summed.view(tensor.shape)
            yield as_it_was if tensor.is_contiguous() else tensor.copy_(as_it_was)


def buckets(tensors: Sequence[Tensor], limit_bytes: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Cut a list into runs of one dtype of at most `limit_bytes` (a larger tensor stands alone), in
    order."""
    runs: list[list[Tensor]] = []
    filled = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if not runs or runs[-1][0].dtype != tensor.dtype or filled + size > limit_bytes:
            runs.append([])
            filled = 0
        runs[-1].append(tensor)
        filled += size
    return runs


@torch.no_grad()
def clip_gradients(
    parameters: Sequence[nn.Parameter], max_norm: float | None, device: torch.device
) -> Tensor:
    """Global L2 norm of the gradients before clipping, [] float64 on the device; scales them down
    to `max_norm` where they exceed it. Nothing waits for the device.

    Args:
        max_norm: None or 0 only measures. All ranks must call; all get the same number.

    The factor is max_norm / (norm + 1e-6), torch.nn.utils.clip_grad_norm_'s. A norm that is not
    finite is returned as it
    is: look at it before the step.
    """
    if max_norm is not None and max_norm < 0:
        raise ValueError(
            f"optim.max_grad_norm={max_norm} is no norm; give a positive number, or 0 not to clip"
        )
    grads = [p.grad for p in parameters if p.grad is not None]
    square = torch.zeros((), dtype=torch.float64, device=device)
    for groups, members in _by_mesh(grads):
        part = (
            torch.nn.utils.get_total_norm([local_tensor(grad) for grad in members])
            .to(device, torch.float64)
            .square()
        )
        for group in groups:
            dist.all_reduce(part, group=group)  # [] -> []
        square += part
    norm = square.sqrt()
    if max_norm and device.type != "cpu":
        scale_unread([local_tensor(grad) for grad in grads], norm, max_norm)
    elif max_norm and not norm.item() + 1e-6 <= max_norm:
        for grad in grads:
            local_tensor(grad).mul_(max_norm / (norm.item() + 1e-6))
    return norm


def scale_unread(grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Scales gradients down to a norm by a factor that stays on the device; 1 where they are
    within it."""
    factor = torch.where(norm + 1e-6 <= max_norm, 1.0, max_norm / (norm + 1e-6))
    for grad in grads:
        # A factor of the type of half-precision gradients would have three digits.
        wide = torch.promote_types(grad.dtype, torch.float32)
        grad.copy_(grad.to(wide) * factor.to(wide))


def _by_mesh(grads: Sequence[Tensor]) -> list[tuple[list[ProcessGroup], list[Tensor]]]:
    """Gradients that are cut over the same groups together, with those groups (none for whole
    ones)."""
    sets: dict[tuple, tuple[list[ProcessGroup], list[Tensor]]] = {}
    for grad in grads:
        cut = _cut_over(grad)
        sets.setdefault(tuple(id(group) for group in cut), (cut, []))[1].append(grad)
    return list(sets.values())


def _cut_over(grad: Tensor) -> list[ProcessGroup]:
    if not isinstance(grad, DTensor):
        return []
    return [
        grad.device_mesh.get_group(axis)
        for axis, span in enumerate(grad.placements)
        if span.is_shard()
    ]
