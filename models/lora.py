"""Low-rank adapters: a linear layer learns a difference of low rank, and its own weight stays.

Letters: D features in, E features out, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.convolution.short_conv import uniform
from models.init import constant
from models.layer import Rule

LEAVES = ("lora_A", "lora_B")


class LoraLinear(nn.Linear):
    """x W' + (alpha / r) x A' B': a linear layer with an adapter.

    A layer of a model becomes one in place (`add_adapters`), so that its weight keeps its name. A
    [r, D] starts uniform in +-1 / sqrt(D), as in peft, and B [E, r] with zeros: before the first
    step the model is the one without adapters. Source: Hu et al. 2021 (arXiv:2106.09685).

    Attributes:
        scale: alpha / r.
        multiply_adds: of a token by the two matrices.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale: float
    multiply_adds: int

    def init_rules(self) -> Mapping[str, Rule]:
        """See models.layer.Layer.init_rules."""
        return {"lora_A": uniform(self.in_features**-0.5), "lora_B": constant(0.0)}

    def forward(self, input: Tensor) -> Tensor:
        """[..., D] -> [..., E]."""
        low = self.scale * F.linear(input, self.lora_A)
        # In place, and scaled where it is narrow: at a million tokens E is most of the memory.
        return super().forward(input).add_(F.linear(low, self.lora_B))


def add_adapters(model: nn.Module, *, rank: int, alpha: float, targets: Sequence[str]) -> list[str]:
    """Turns the linear layers that a pattern chooses into layers with adapters, in place.

    Args:
        model: as built; its own parameters are excluded from training.
        rank: r.
        alpha: the adapter's output is multiplied by alpha / r.
        targets: shell patterns over the whole names of modules; `*` stands for any letters.

    Returns:
        the names of these layers.

    Raises:
        ValueError: a pattern chooses no linear layer, or the rank is above a layer's sizes.
    """
    linear = {name: part for name, part in model.named_modules() if type(part) is nn.Linear}
    for pattern in targets:
        if not any(fnmatchcase(name, pattern) for name in linear):
            known = ", ".join([*linear][:6])
            raise ValueError(
                f"lora.targets={list(targets)}: no linear layer is called {pattern}; known:"
                f" {known}, ...; * stands for any letters"
            )
    names = [name for name in linear if any(fnmatchcase(name, pattern) for pattern in targets)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        _adapt(linear[name], name, rank, alpha)
    return names


def _adapt(layer: nn.Linear, name: str, rank: int, alpha: float) -> None:
    least = min(layer.in_features, layer.out_features)
    if rank > least:
        raise ValueError(
            f"lora.rank={rank}: {name} is {layer.out_features} x {layer.in_features}, and a matrix"
            f" of that rank is no saving; use lora.rank={least} or less, or other lora.targets"
        )
    like = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    # The class of the object changes, and not the object: others may hold it too.
    layer.__class__ = LoraLinear
    assert isinstance(layer, LoraLinear)
    layer.lora_A = nn.Parameter(torch.empty(rank, layer.in_features, **like))
    layer.lora_B = nn.Parameter(torch.empty(layer.out_features, rank, **like))
    layer.scale = alpha / rank
    layer.multiply_adds = rank * (layer.in_features + layer.out_features)
    if not layer.weight.is_meta:
        with torch.no_grad():
            nn.init.uniform_(layer.lora_A, -(layer.in_features**-0.5), layer.in_features**-0.5)
            layer.lora_B.zero_()


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """Yields the layers with adapters, each with its name."""
    for name, part in model.named_modules():
        if isinstance(part, LoraLinear):
            yield name, part


def adapter_names(model: nn.Module) -> set[str]:
    """Returns the names of the parameters of all adapters."""
    return {f"{name}.{leaf}" for name, _ in adapters(model) for leaf in LEAVES}


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the weights of the model without adapters that computes the same.

    Each is worked out when it is asked for, and none is kept.

    Args:
        model: with adapters; its own tensors are not read.
        tensors: of the model, whole, by name.
    """
    return _MergedWeights(model, tensors)


class _MergedWeights(Mapping[str, Tensor]):
    """See `merged`."""

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]):
        self.tensors = tensors
        self.scales = {f"{name}.weight": layer.scale for name, layer in adapters(model)}
        beside = adapter_names(model)
        self.names = [name for name in tensors if name not in beside]

    def __getitem__(self, name: str) -> Tensor:
        scale = self.scales.get(name)
        if scale is None:
            return self.tensors[name]
        layer = name.removesuffix(".weight")
        down = self.tensors[f"{layer}.lora_A"].double()
        up = self.tensors[f"{layer}.lora_B"].double()
        weight = self.tensors[name]
        return (weight.double() + scale * (up @ down)).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)
