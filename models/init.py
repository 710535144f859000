"""Initial weights: each a pure function of (seed, parameter name), whatever the ranks, the order and the placement.

A module may say what its parameters start from with a method `initial() -> {name: rule}`; names may reach into children
("out.weight"). A rule takes (shape, generator) and returns float32. Without one, matrices are normal with a deviation of
0.02 (Radford et al. 2019), or the whole model's own `deviation`; norms are one, biases zero.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Rule = Callable[[torch.Size, torch.Generator], Tensor]

DEVIATION = 0.02


def normal(deviation: float) -> Rule:
    """Normal, mean 0."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * deviation


@dataclass(frozen=True)
class Usual:
    """Normal, mean 0, in units of the model's usual deviation.

    Attributes:
        factor: that many of them.
        deviation: the usual one; `rules` puts that of the whole model in its place.
    """

    factor: float = 1.0
    deviation: float = DEVIATION

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * (self.factor * self.deviation)


def constant(value: float) -> Rule:
    """The same value everywhere."""
    return lambda shape, generator: torch.full(shape, value)


def orthogonal(gain: float = 1.0) -> Rule:
    """Rows, or columns where they are fewer, of length `gain` and at right angles; Saxe et al. 2013 (arXiv:1312.6120)."""

    def rule(shape: torch.Size, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(max(shape), min(shape), generator=generator, dtype=torch.float64)
        turned, triangle = torch.linalg.qr(drawn)
        turned = turned * triangle.diagonal().sign()  # else QR's own choice of signs would show
        return (gain * (turned if shape[0] >= shape[1] else turned.T)).float()

    return rule


def _rule(owner: nn.Module, leaf: str, dims: int) -> Rule:
    if "norm" in type(owner).__name__.lower():
        return constant(0.0 if leaf == "bias" else 1.0)
    return constant(0.0) if leaf == "bias" or dims < 2 else Usual()


def rules(model: nn.Module) -> dict[str, Rule]:
    """The rule of every parameter by its full name; an outer module's word counts more than an inner one's."""
    found: dict[str, Rule] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            found[f"{name}.{leaf}".lstrip(".")] = _rule(module, leaf, parameter.dim())
    for name, module in reversed(list(model.named_modules())):
        for leaf, rule in getattr(module, "initial", dict)().items():
            found[f"{name}.{leaf}".lstrip(".")] = rule
    usual = getattr(model, "deviation", DEVIATION)
    return {name: replace(rule, deviation=usual) if isinstance(rule, Usual) else rule for name, rule in found.items()}


def initial_tensor(model: nn.Module, name: str, seed: int) -> Tensor:
    """The whole parameter of that name as it is before step 1, float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/initial weights/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.device("cpu"):
        return rules(model)[name](model.get_parameter(name).shape, generator)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Fill every parameter of a model that is whole on this device."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_tensor(model, name, seed))
    return model
