"""Give a model that was built on the meta device its weights: the same numbers on any number of
ranks, nothing sent.

Initial weights are a pure function of (seed, parameter name), or what constructors give. Each rank
computes one full parameter at a time on the CPU and keeps the part that is its own, so that a
sharded start equals the unsharded one bit for bit. (DTensor's own random initialisation is not
rank-aware on a CPU mesh: every shard would draw the same numbers.)
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from models.construction import (
    Origin,
    Values,
    constructed,
    foreign,
    holds_meta,
    modules_of,
    on,
    parts,
    unfilled,
)
from models.init import draw, said, usual
from models.layer import has_hook, hook

WORDS = {
    1: torch.uint8,
    2: torch.int16,
    4: torch.int32,
    8: torch.int64,
}  # a tensor's bits, by bytes of an element
PART = 1 << 24  # elements weighed at once
WEIGHT = (
    -7046029254386353131
)  # 2^64 / golden ratio as a signed number: spreads neighbouring places apart


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies on this rank: all of it, unless it is a DTensor. Shares
    memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def checksum(tensor: Tensor) -> str:
    """A number of 64 bits for the bits of what lies on this rank, computed where it lies.

    Bits are added up with an odd weight for each place, so that no change of one element is missed.
    """
    flat = local_tensor(tensor).detach().contiguous().flatten()
    flat = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    bits = flat.view(WORDS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, len(bits), PART):
        part = bits[start : start + PART].long()
        places = torch.arange(start, start + len(part), device=bits.device)
        total += ((part + 1) * (places * WEIGHT | 1)).sum()
    return f"{int(total) & (1 << 64) - 1:016x}"


@torch.no_grad()
def copy_into(target: Tensor, value: Tensor) -> None:
    """Copy `value` into `target`; either may be whole or sharded. A whole `value` must be equal on
    every rank.

    Only sharded into whole, or a change of sharding or mesh, communicates (all ranks must then call
    it).
    """
    if isinstance(target, DTensor):
        mesh = target.device_mesh
        placements = target.placements
        if isinstance(value, DTensor) and value.device_mesh != mesh:
            value = value.full_tensor()
        if isinstance(value, DTensor):
            value = value.redistribute(mesh, placements)
        elif (own := _own_slice(target, value)) is not None:
            value = own
        else:
            value = distribute_tensor(
                value.to(mesh.device_type), mesh, placements, src_data_rank=None
            )
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    local_tensor(target).copy_(local_tensor(value))


def _own_slice(target: DTensor, value: Tensor) -> Tensor | None:
    """A view of what this rank holds of a whole tensor; None where it is cut along several dims.

    It saves the copy that distribute_tensor makes, and the transfer of the rest to the device.
    """
    cuts = [(i, p) for i, p in enumerate(target.placements) if not p.is_replicate()]
    if len(cuts) != 1:
        return None
    mesh_dim, placement = cuts[0]
    # An exact type: a strided shard lies elsewhere.
    if not isinstance(placement, Shard) or type(placement) is not Shard:
        return None
    length = value.shape[placement.dim]
    chunk = -(-length // target.device_mesh.size(mesh_dim))
    start = min(chunk * target.device_mesh.get_local_rank(mesh_dim), length)
    return value.narrow(placement.dim, start, min(chunk, length - start))


def materialize(
    model: nn.Module, device: torch.device, seed: int, how: dict[str, str] | None = None
) -> str:
    """Fill every parameter and buffer that is on the meta device, in place; what has values already
    is only moved.

    Tied parameters stay tied, names and `requires_grad` stay, and a DTensor keeps its sharding.
    What constructors give is made part by part (models/construction.py), so a rank never holds more
    than one part whole.

    Args:
        how: filled with what every parameter and buffer starts from, for the log.

    Returns:
        A digest of the whole parameters, before they were cut: it must be equal on every rank.

    Raises:
        ValueError: no rule and no constructor says what a parameter or a buffer starts from.
    """
    filling = _Filling(model, device, seed, {} if how is None else how)
    known = list(parts(model))
    if not any(module is model for _, module, _ in known):
        filling.fill("", model, None)
    for name, part, origin in known:
        filling.fill(name, part, origin)
    return filling.digest.hexdigest()


class _Filling:
    """The state of `materialise` as it goes from part to part."""

    def __init__(self, model: nn.Module, device: torch.device, seed: int, how: dict[str, str]):
        self.device = device
        self.seed = seed
        self.how = how
        self.places = _places(model)
        self.digest = hashlib.blake2b(digest_size=16)
        self.said = said(model)
        self.usual = usual(model)
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}

    def fill(self, name: str, part: nn.Module, origin: Origin | None) -> None:
        """Fills what belongs to the part itself and not to the parts inside it."""
        modules = list(modules_of(part))
        values = None
        if origin is not None and (foreign(part, origin) or self._lacks(modules)):
            values = constructed(name, part, origin, self.seed)
        for inner, module in modules:
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                first = self.names.pop(
                    id(parameter), None
                )  # None: tied to one that is filled already
                if first is not None:
                    self._fill_parameter(
                        first, name, f"{inner}.{leaf}".lstrip("."), parameter, values
                    )
            self._fill_buffers(f"{name}.{inner}".strip("."), inner, module, values)
            if values is not None:
                self._fill_attributes(inner, module, values)

    def _lacks(self, modules: list[tuple[str, nn.Module]]) -> bool:
        """Returns True where some value can only come from a constructor."""
        for _, module in modules:
            for parameter in module.parameters(recurse=False):
                name = self.names.get(id(parameter))
                if (
                    parameter.is_meta
                    and name is not None
                    and name not in self.said
                    and name not in self.usual
                ):
                    return True
            blank = any(buffer.is_meta for buffer in module.buffers(recurse=False))
            if blank and not has_hook(module, "reset_buffers"):
                return True
            if any(
                holds_meta(value) for key, value in vars(module).items() if not key.startswith("_")
            ):
                return True
        return False

    def _fill_parameter(
        self, name: str, part: str, inner: str, parameter: nn.Parameter, values: Values | None
    ) -> None:
        if parameter.is_meta:
            value, self.how[name] = self._start(name, part, inner, parameter, values)
            value = value.to(parameter.dtype)
            self.digest.update(f"{name} {checksum(value)} ".encode())
            fresh = nn.Parameter(
                torch.empty_like(parameter, device=self.device),
                requires_grad=parameter.requires_grad,
            )
            copy_into(fresh, value)
            for module, attribute in self.places[id(parameter)]:
                setattr(module, attribute, fresh)
            return
        self.how[name] = "as it came"
        if not isinstance(parameter, DTensor):
            parameter.data = parameter.data.to(self.device)
            self.digest.update(f"{name} {checksum(parameter)} ".encode())

    def _start(
        self, name: str, part: str, inner: str, parameter: nn.Parameter, values: Values | None
    ) -> tuple[Tensor, str]:
        """The whole value that a parameter starts from, and what the log says of it.

        A rule of the part itself counts most, then what its constructor gave, then a rule of the
        model around it.
        """
        rule, text, speaker = self.said.get(name, (self.usual.get(name), "", None))
        own_word = speaker is not None and f"{speaker}.".startswith(f"{part}." if part else "")
        if rule is not None and (own_word or values is None or inner not in values.touched):
            return draw(rule, name, parameter.shape, self.seed), text or str(rule)
        if values is None or inner not in values.tensors:
            raise ValueError(
                f"{name} was built on the meta device and nothing says what it starts from; give"
                " its layer a method init_rules() -> {name: rule} (models/init.py)"
            )
        if reason := unfilled(name, values.tensors[inner]):
            raise ValueError(reason)
        return values.tensors[inner], "as constructed"

    def _fill_buffers(
        self, name: str, inner: str, module: nn.Module, values: Values | None
    ) -> None:
        blank = [leaf for leaf, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            setattr(
                module,
                leaf,
                (
                    torch.empty_like(buffer, device=self.device)
                    if buffer.is_meta
                    else buffer.to(self.device)
                ),
            )
        if not blank:
            return
        if has_hook(module, "reset_buffers"):
            with torch.device(self.device):
                hook(module, "reset_buffers")()
            return
        for leaf in blank:
            value = None if values is None else values.tensors.get(f"{inner}.{leaf}".lstrip("."))
            if value is None:
                raise ValueError(
                    f"{name or 'the model'} ({type(module).__name__}) has a buffer and was built on"
                    " the meta device, but it has no reset_buffers() to compute it again; add that"
                    " method"
                )
            module.get_buffer(leaf).copy_(value)
            self.how[f"{name}.{leaf}".lstrip(".")] = "as constructed (buffer)"

    def _fill_attributes(self, inner: str, module: nn.Module, values: Values) -> None:
        """Gives tensors that are neither parameters nor buffers what their constructor gave
        them."""
        blank = [
            key
            for key, value in vars(module).items()
            if not key.startswith("_") and holds_meta(value)
        ]
        for key in blank:
            if (inner, key) in values.attributes:
                setattr(module, key, on(self.device, values.attributes[inner, key]))


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns the owners of each parameter by its id; a tied parameter has several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(id(parameter), []).append((module, attribute))
    return places


def named(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(every name of a parameter, the first of its names): they differ where parameters are
    tied."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, first.setdefault(id(parameter), name)
