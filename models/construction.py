"""Values that constructors give to parameters, buffers and tensors of a model built on meta.

A model is built without memory first. Where a layer gives its parameters values of its own, the
part that it stands in (a mixer, a feed-forward layer, or the model around them) is built once more
on the CPU, its tensors are taken, and it is
dropped: never more than one part at a time. Random numbers that a constructor draws are a function
of (seed, name of the part).
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_any, tree_map

from models.declared import declared
from models.init import said

HOUSE = ("models", "parallel", "torch")  # packages whose layers say by rules what they start from
DRAWING = (
    "reset_parameters",
    "_reset_parameters",
)  # methods by which torch's own layers draw their weights


@dataclass(frozen=True)
class Origin:
    """The way a part of a model was made; its module has it as `origin`.

    Attributes: build: makes it again on the device in force; parts inside it that have an origin of
        their own stay on meta. foreign: classes that are not ours take part.
    """

    build: Callable[[], nn.Module]
    foreign: bool = False

    def hang_on(self, part: nn.Module) -> None:
        """The part is one that `build` makes again."""
        object.__setattr__(part, "origin", self)


@dataclass
class Values:
    """Of one part, by names in the part.

    Attributes: tensors: parameters and buffers. touched: parameters that are not as torch's own
        layers drew them. attributes: {(name of module, attribute): value} of what holds tensors and
        is neither.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    touched: set[str] = field(default_factory=set)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)


def parts(model: nn.Module) -> Iterator[tuple[str, nn.Module, Origin]]:
    """(name, module, origin) of every part that can be built again, in the order of the model."""
    for name, module in model.named_modules():
        origin = declared(module, "origin", Origin, None)
        if origin is not None:
            yield name, module, origin


def modules_of(part: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a part by their names in it, without those of the parts inside it."""
    inner: set[nn.Module] = set()
    for _, module, _ in parts(part):
        if module is not part:
            inner.update(module.modules())
    for name, module in part.named_modules():
        if module not in inner:
            yield name, module


def foreign(part: nn.Module, origin: Origin) -> bool:
    """Reports that constructors which are not ours made some of it."""
    return origin.foreign or any(
        type(m).__module__.partition(".")[0] not in HOUSE for _, m in modules_of(part)
    )


def holds_meta(value: Any) -> bool:
    """Reports a tensor without values, alone or in lists, tuples and dicts."""
    return tree_any(lambda leaf: isinstance(leaf, Tensor) and leaf.is_meta, value)


def constructed(name: str, part: nn.Module, origin: Origin, seed: int) -> Values:
    """Builds the part again on the CPU and takes what its constructors gave.

    Args:
        name: of the part in its model.
    """
    digest = hashlib.blake2b(f"{seed}/constructor/{name}".encode(), digest_size=8).digest()
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        _empty_is_nan(),
        _as_drawn() as drawn,
    ):
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        twin = origin.build()
    wanted = {inner for inner, _ in modules_of(part)}
    values = Values()
    for inner, module in twin.named_modules():
        if inner not in wanted:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{inner}.{leaf}".lstrip(".")
            values.tensors[full] = parameter.detach()
            _, before = drawn.get(id(parameter), (None, None))
            if before is None or not torch.equal(before, parameter):
                values.touched.add(full)
        for leaf, buffer in module.named_buffers(recurse=False):
            values.tensors[f"{inner}.{leaf}".lstrip(".")] = buffer.detach()
        for attribute, value in vars(module).items():
            if not attribute.startswith("_") and tree_any(
                lambda leaf: isinstance(leaf, Tensor), value
            ):
                values.attributes[inner, attribute] = value
    return values


def on(device: torch.device, value: Any) -> Any:
    """The tensors in it on that device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)


def unfilled(name: str, tensor: Tensor) -> str | None:
    """Why a constructor's value is none, if so: torch.empty was never filled."""
    if not tensor.is_floating_point() or not tensor.isnan().any():
        return None
    return (
        f"{name}: its constructor leaves it without a value (torch.empty); fill it there, or say by"
        " a method init_rules() -> {name: rule} what it starts from (models/init.py)"
    )


def never_filled(model: nn.Module, seed: int) -> Iterator[str]:
    """Why parameters of layers that are not ours would start from nothing: a sentence each. Builds
    part after part."""
    rules = said(model)
    for name, part, origin in parts(model):
        if not foreign(part, origin):
            continue
        values = constructed(name, part, origin, seed)
        for inner in sorted(values.touched):
            full = f"{name}.{inner}".lstrip(".")
            reason = unfilled(full, values.tensors[inner])
            if reason is not None and full not in rules:
                yield reason


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Lets torch.empty return NaN, so that a value which is never filled in shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@contextmanager
def _as_drawn() -> Iterator[dict[int, tuple[nn.Parameter, Tensor]]]:
    """By id, the parameters that torch's own layers draw meanwhile, and copies of them as they were
    drawn."""
    drawn: dict[int, tuple[nn.Parameter, Tensor]] = {}

    def noting(method: Callable) -> Callable:
        def draw(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            for parameter in self.parameters():
                drawn[id(parameter)] = (parameter, parameter.detach().clone())
            return result

        return draw

    methods = [
        (kind, name, vars(kind)[name])
        for kind in _kinds_of_torch()
        for name in DRAWING
        if name in vars(kind)
    ]
    try:
        for kind, name, method in methods:
            setattr(kind, name, noting(method))
        yield drawn
    finally:
        for kind, name, method in methods:
            setattr(kind, name, method)


def _kinds_of_torch() -> set[type]:
    """The classes of torch's layers and what they inherit from."""
    offered = [
        kind for kind in vars(nn).values() if isinstance(kind, type) and issubclass(kind, nn.Module)
    ]
    return {
        kind
        for each in offered
        for kind in each.__mro__
        if kind.__module__.startswith("torch.nn.modules.")
    }
