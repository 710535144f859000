"""Give a model that was built on the meta device its weights: the same numbers on any number of ranks, nothing sent.

Initial weights are a pure function of (seed, parameter name). Each rank computes one full parameter at a time on the CPU
and keeps the part that is its own, so that a sharded start equals the unsharded one bit for bit. (DTensor's own random
initialisation is not rank-aware on a CPU mesh: every shard would draw the same numbers.)
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from models.init import initial_tensor

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # a tensor's bits, by bytes of an element
PART = 1 << 24  # elements weighed at once
WEIGHT = -7046029254386353131  # 2^64 / golden ratio as a signed number: spreads neighbouring places apart


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: all of it, unless it is a DTensor. Shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """A number of 64 bits for the bits of what lies on this rank, computed where it lies.

    Bits are added up with an odd weight for each place, so that no change of one element is missed.
    """
    flat = local(tensor).detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), PART):
        part = bits[start : start + PART].long()
        places = torch.arange(start, start + len(part), device=bits.device)
        total += ((part + 1) * (places * WEIGHT | 1)).sum()
    return f"{int(total) & (1 << 64) - 1:016x}"


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`; either may be whole or sharded. A whole `value` must be equal on every rank.

    Only sharded into whole, or a change of sharding or mesh, communicates (all ranks must then call it).
    """
    if isinstance(target, DTensor):
        mesh, placements = target.device_mesh, target.placements
        if isinstance(value, DTensor) and value.device_mesh != mesh:
            value = value.full_tensor()
        if isinstance(value, DTensor):
            value = value.redistribute(mesh, placements)
        else:
            value = distribute_tensor(value.to(mesh.device_type), mesh, placements, src_data_rank=None)
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    local(target).copy_(local(value))


def materialise(model: nn.Module, device: torch.device, seed: int) -> str:
    """Fill every parameter and buffer that is on the meta device, in place; what has values already is only moved.

    Tied parameters stay tied, names and `requires_grad` stay, and a DTensor keeps its sharding.

    Returns:
        A digest of the whole parameters, before they were cut: it must be equal on every rank.

    Raises:
        ValueError: a module has a buffer on the meta device and no `reset_buffers()` to compute it again.
    """
    places, drawn = _places(model), hashlib.blake2b(digest_size=16)
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            fresh = nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad)
            value = initial_tensor(model, name, seed).to(parameter.dtype)
            drawn.update(f"{name} {checksum(value)} ".encode())
            put(fresh, value)
            for module, attribute in places[id(parameter)]:
                setattr(module, attribute, fresh)
        elif not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(device)
            drawn.update(f"{name} {checksum(parameter)} ".encode())
    for name, module in model.named_modules():
        _materialise_buffers(name, module, device)
    return drawn.hexdigest()


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each parameter hangs, by its id: more than one place where it is tied."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, attribute))
    return places


def _materialise_buffers(name: str, module: nn.Module, device: torch.device) -> None:
    empty = False
    for attribute, buffer in list(module.named_buffers(recurse=False)):
        empty = empty or buffer.is_meta
        setattr(module, attribute, torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device))
    if not empty:
        return
    reset = getattr(module, "reset_buffers", None)
    if reset is None:
        raise ValueError(
            f"{name or 'the model'} ({type(module).__name__}) has a buffer and was built on the meta device, but it has "
            "no reset_buffers() to compute it again; add that method"
        )
    with torch.device(device):
        reset()


def named(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(every name of a parameter, the first of its names): they differ where parameters are tied."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, first.setdefault(id(parameter), name)
