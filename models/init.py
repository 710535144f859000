"""Initial weights: each a pure function of (seed, parameter name), whatever the ranks, the order
and the placement.

A module may say what its parameters start from: `init_rules() -> {name: rule}`, whose names may
reach into children ("out.weight"). A rule takes (shape, generator) and returns float32. Without
one, matrices of torch's layers are normal with a deviation of 0.02 (Radford et al. 2019), or the
whole model's own `deviation`; their norms are one, their biases zero. A parameter that a layer
creates itself keeps the value that the constructor gave it, and so does one of torch's layers that
a constructor changed after torch had drawn it (models/construction.py).
"""

import hashlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from models.declared import declared
from models.layer import Rule, hook

INIT_STD = 0.02
MATRICES = (nn.Linear, nn.Bilinear, _ConvNd, nn.Embedding, nn.EmbeddingBag)
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)
CELLS = (nn.RNNBase, nn.RNNCellBase)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias")


@dataclass(frozen=True)
class Described:
    """A rule and what the log says of it."""

    rule: Rule
    text: str

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return self.rule(shape, generator)

    def __str__(self) -> str:
        return self.text


def normal(deviation: float) -> Rule:
    """Normal, mean 0."""
    return Described(
        lambda shape, generator: torch.randn(shape, generator=generator) * deviation,
        f"normal({deviation:.3g})",
    )


@dataclass(frozen=True)
class ScaledNormal:
    """Normal, mean 0, in units of the model's usual deviation.

    Attributes:
        factor: that many of them.
        deviation: the usual one; `rules` puts that of the whole model in its place.
    """

    factor: float = 1.0
    deviation: float = INIT_STD

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * (self.factor * self.deviation)

    def __str__(self) -> str:
        return f"normal({self.factor * self.deviation:.3g})"


def constant(value: float) -> Rule:
    """The same value everywhere."""
    return Described(lambda shape, generator: torch.full(shape, value), f"{value:g}")


def orthogonal(gain: float = 1.0) -> Rule:
    """Rows, or columns where they are fewer, of length `gain` and at right angles; Saxe et al. 2013
    (arXiv:1312.6120)."""

    def rule(shape: torch.Size, generator: torch.Generator) -> Tensor:
        drawn = torch.randn(max(shape), min(shape), generator=generator, dtype=torch.float64)
        turned, triangle = torch.linalg.qr(drawn)
        turned = turned * triangle.diagonal().sign()  # else QR's own choice of signs would show
        return (gain * (turned if shape[0] >= shape[1] else turned.T)).float()

    return Described(rule, f"orthogonal({gain:g})")


def _of_torch(owner: nn.Module, leaf: str) -> Rule | None:
    """The rule of a parameter that a layer of torch creates; None: another layer does, or there is
    no rule for its kind."""
    if isinstance(owner, NORMS) and leaf in ("weight", "bias"):
        return constant(0.0 if leaf == "bias" else 1.0)
    known = (
        (isinstance(owner, MATRICES) and leaf in ("weight", "bias"))
        or (isinstance(owner, CELLS) and leaf.startswith(("weight_", "bias_")))
        or (isinstance(owner, nn.MultiheadAttention) and leaf in PROJECTIONS)
    )
    if not known:
        return None
    if "bias" in leaf:
        return constant(0.0)
    padding = declared(owner, "padding_idx", int, None)
    return ScaledNormal() if padding is None else Padded(row=padding)


@dataclass(frozen=True)
class Padded(ScaledNormal):
    """As Usual, but 0 in the row that stands for padding."""

    row: int = 0

    def __call__(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        drawn = super().__call__(shape, generator)
        drawn[self.row] = 0
        return drawn


class Said(NamedTuple):
    """A rule that a module says by `init_rules`.

    Attributes:
        text: for the log. speaker: the name of the module.
    """

    rule: Rule
    text: str
    speaker: str


def said(model: nn.Module) -> dict[str, Said]:
    """By full name, the rules that modules say by `init_rules`; an outer module's word counts more
    than an inner one's."""
    rules_said: dict[str, Said] = {}
    for name, module in reversed(list(model.named_modules())):
        for leaf, rule in hook(module, "init_rules")().items():
            rule = _scaled(model, rule)
            text = (
                str(rule)
                if isinstance(rule, Described | ScaledNormal)
                else f"by {type(module).__name__}.init_rules"
            )
            rules_said[f"{name}.{leaf}".lstrip(".")] = Said(rule, text, name)
    return rules_said


def usual(model: nn.Module) -> dict[str, Rule]:
    """By full name, the rules of the parameters that torch's layers create."""
    found: dict[str, Rule] = {}
    for name, module in model.named_modules():
        for leaf, _ in module.named_parameters(recurse=False):
            rule = _of_torch(module, leaf)
            if rule is not None:
                found[f"{name}.{leaf}".lstrip(".")] = _scaled(model, rule)
    return found


def init_rules(model: nn.Module) -> dict[str, Rule]:
    """The rule of every parameter that has one, by its full name."""
    return usual(model) | {name: rule for name, (rule, _, _) in said(model).items()}


def _scaled(model: nn.Module, rule: Rule) -> Rule:
    """In units of the model's own deviation."""
    stated = hook(model, "init_std")
    deviation = float(INIT_STD if stated is None else stated)
    return replace(rule, deviation=deviation) if isinstance(rule, ScaledNormal) else rule


def draw(rule: Rule, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Draws the value that the rule gives the parameter of that name, float32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/initial weights/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.device("cpu"):
        return rule(shape, generator)


def initial_tensor(model: nn.Module, name: str, seed: int) -> Tensor:
    """The whole parameter of that name as it is before step 1, float32 on the CPU.

    Raises:
        ValueError: no rule says what it starts from.
    """
    rule = init_rules(model).get(name)
    if rule is None:
        raise ValueError(
            f"{name} has no rule; its layer needs a method init_rules() -> {{name: rule}}"
            " (models/init.py)"
        )
    return draw(rule, name, model.get_parameter(name).shape, seed)


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Fill the parameters of a model that is whole on this device; those without a rule stay as
    they were constructed."""
    known = init_rules(model)
    for name, parameter in model.named_parameters():
        if name in known:
            parameter.copy_(draw(known[name], name, parameter.shape, seed))
    return model
