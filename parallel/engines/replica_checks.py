"""Checks by checksum that replicas of the same tensors are equal; sends a few bytes.

Every rank draws its initial weights by itself and reads checkpoints by itself; nothing else would
notice that one of them came to other numbers. A copy is what lies whole on a rank, or the same
shard of a sharded tensor.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from parallel.engines.base import Engine
from parallel.engines.materialize import checksum


class Difference(NamedTuple):
    """A tensor that differs between ranks, with the ranks on the smaller and on the larger side."""

    name: str
    others: list[int]
    most: list[int]


def held(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that an engine computes and updates: parameters, buffers, masters, the
    optimiser's state."""
    computed = dict(engine.model.named_parameters())
    known = {id(parameter) for parameter in computed.values()}
    yield from computed.items()
    yield from engine.model.named_buffers()
    for name, parameter in engine.parameters.items():
        if id(parameter) not in known:
            yield f"{name} (as it is trained)", parameter
    for name, value in engine.moments().items():
        if isinstance(value, Tensor):
            yield f"{name} (of the optimiser)", value


def compare_tensors(
    tensors: Iterable[tuple[str, Tensor]], group: ProcessGroup | None
) -> Difference | None:
    """The first tensor whose copies differ; None where there is none. Collective; the same answer
    on every rank."""
    if group is None:
        return None
    copies: dict[str, dict[str, str]] = {}
    for name, tensor in tensors:
        copies.setdefault(_shard(tensor), {})[name] = checksum(tensor)
    summary = {shard: {"": _digest(sums)} for shard, sums in copies.items()}
    if compare(summary, group) is None:
        return None
    return compare(copies, group)  # only now is a line for each tensor sent


def compare(
    copies: Mapping[str, Mapping[str, str]], group: ProcessGroup | None
) -> Difference | None:
    """The first name under which ranks say different things; None where there is none. Collective.

    Args:
        copies: {shard: {name: what this rank has to say}}; compared are the ranks that have the
            same shard.
    """
    if group is None:
        return None
    mine = [(shard, name, text) for shard, texts in copies.items() for name, text in texts.items()]
    gathered: list[list[tuple[str, str, str]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, mine, group=group)
    sides: dict[tuple[str, str], dict[str, list[int]]] = {}
    for rank, entries in enumerate(gathered):
        for shard, name, text in entries:
            sides.setdefault((shard, name), {}).setdefault(text, []).append(rank)
    for (_, name), ranks in sides.items():
        if len(ranks) > 1:
            return Difference(name, *split(ranks))
    return None


def split(sides: Mapping[Any, list[int]]) -> tuple[list[int], list[int]]:
    """({what is said: ranks that say so}) -> the ranks outside the largest side, and those of
    it."""
    most = max(sides.values(), key=len)
    return sorted(rank for ranks in sides.values() if ranks is not most for rank in ranks), most


def _digest(sums: Mapping[str, str]) -> str:
    return hashlib.blake2b(repr(sorted(sums.items())).encode(), digest_size=8).hexdigest()


def _shard(tensor: Tensor) -> str:
    """Returns a name of the local shard of a tensor; '' where it is whole."""
    if not isinstance(tensor, DTensor):
        return ""
    coordinates = tensor.device_mesh.get_coordinate() or []
    cut = [
        f"{dim}:{place}"
        for dim, (place, placement) in enumerate(zip(coordinates, tensor.placements))
        if not placement.is_replicate()
    ]
    return f"{tuple(tensor.device_mesh.shape)} {' '.join(cut)}" if cut else ""
