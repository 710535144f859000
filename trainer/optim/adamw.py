"""AdamW, with weight decay only on matrices that multiply activations.

A module may declare exceptions for its parameters, or for whole submodules: `weight_decay` (names
that weight decay acts on although they belong to no linear layer of torch), `no_weight_decay`
(names that it leaves alone) and `lr_scale` ({name: factor of the learning rate}); models/layer.py.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.layer import hook
from parallel.engines.optimizer_offload import empty_moment
from trainer.optim.selection import group_settings

LINEAR = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101).

    The group conf/optim names the class and its settings.

    Args:
        learning_rate: at the peak of the schedule.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: per step, times the learning rate; `decayed_parameters` says what it acts on.
        max_grad_norm: largest global norm of the gradient; 0 = no clipping.
        auxiliary_weight: of the losses that layers add to the language loss (models/auxiliary.py).
        groups: {"match": patterns, "learning_rate", "weight_decay"} of parameters that have their
            own (trainer/optim/selection.py); None = as all others.

    Raises:
        ValueError: a number out of its range.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    auxiliary_weight: float = 1.0
    groups: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"optim.{name}={value} must be a positive number")
        for name in ("weight_decay", "max_grad_norm", "auxiliary_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"optim.{name}={value} must be 0 (off) or a positive number")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optim.betas={list(self.betas)} must be two numbers from 0 up to, not with, 1"
            )

    def __call__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> torch.optim.AdamW:
        """Builds the torch optimizer, with its state allocated from the start.

        Args:
            model: declares weight decay and factors of the learning rate.
            parameters: {name in `model`: parameter}; frozen ones are left out.

        Returns:
            An optimizer whose groups carry "rate", the factor by which the training loop multiplies
            the learning rate of the schedule to set the group's "lr".
        """
        trained: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if parameter.requires_grad:
                trained[name] = parameter
        # Fused on GPUs only. The last bits of the CPU's fused kernel depend on where a tensor was
        # cut (6 of 10007 elements after 5 steps, in 770 pieces against one), and foreach is slower
        # than the plain loop there.
        fused = all(parameter.device.type == "cuda" for parameter in trained.values())
        optimizer = torch.optim.AdamW(
            self._groups(model, trained),
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=fused,
            foreach=False,
        )
        # A checkpoint is read into the state in place, also before the first step.
        for parameter in trained.values():
            optimizer.state[parameter] = _initial_state(parameter, fused)
        return optimizer

    def _groups(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> list[dict[str, object]]:
        """Builds the parameter groups of equal learning rate and weight decay, in a fixed order."""
        groups = self.grouped(model, parameters)
        # Not in the order of the parameters: group 0 is the main one whatever comes first in the
        # model.
        keys = sorted(groups, key=lambda key: (key[0] != 1, not key[1]))
        return [self.group(groups[key], key) for key in keys]

    def group(self, parameters: list[nn.Parameter], key: tuple[float, float]) -> dict[str, object]:
        """Builds one parameter group of torch from a key of `grouped`."""
        rate, weight_decay = key
        return {"params": parameters, "rate": rate, "weight_decay": weight_decay}

    def grouped(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> dict[tuple[float, float], list[nn.Parameter]]:
        """Sorts parameters by (factor of the learning rate, weight decay).

        A group's own learning rate counts beside the factor that a layer asks for.
        """
        decayed = decayed_parameters(model)
        scales = lr_scales(model)
        own = group_settings(model, self.groups)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            settings = own.get(name, {})
            rate = scales.get(name, 1.0)
            if settings.get("learning_rate") is not None:
                rate *= settings["learning_rate"] / self.learning_rate
            weight_decay = 0.0
            if name in decayed:
                asked = settings.get("weight_decay")
                weight_decay = self.weight_decay if asked is None else asked
            groups.setdefault((rate, weight_decay), []).append(parameter)
        return groups


def decayed_parameters(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that weight decay acts on.

    These are the weights of linear layers, convolutions and recurrent cells of torch, and what a
    module lists in its `weight_decay` (stacks of experts), except what it lists in its
    `no_weight_decay` (networks that write filters). Other parameters are left alone, however many
    dims they have: norms, biases by head or by position, tables of positions, mixing coefficients,
    memory tokens. Embeddings are left out as in OLMo 2 (arXiv:2501.00656): decay shrinks them,
    which makes the gradients of the first layers grow. A tied embedding counts as an embedding.
    """
    # By identity and not by name: a tied parameter has two names.
    decayed: set[int] = set()
    excluded: set[int] = set()
    for module in model.modules():
        if isinstance(module, LINEAR):
            for name, parameter in module.named_parameters(recurse=False):
                # Recurrent cells have weight_ih, weight_hh and biases of one dim.
                if "weight" in name and parameter.ndim >= 2:
                    decayed.add(id(parameter))
        elif isinstance(module, EMBEDDINGS):
            excluded.add(id(module.weight))
        decayed |= _listed(module, "weight_decay")
        excluded |= _listed(module, "no_weight_decay")
    chosen = decayed - excluded
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """Returns {name: factor of the learning rate} from the modules' `lr_scale`; others have 1."""
    factors: dict[int, float] = {}
    for module in model.modules():
        for name, factor in hook(module, "lr_scale").items():
            for parameter in _parameters_of(module, name):
                factors[id(parameter)] = float(factor)
    scales: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in factors:
            scales[name] = factors[id(parameter)]
    return scales


def _listed(module: nn.Module, attribute: str) -> set[int]:
    """Returns the ids of the parameters that a module names in an attribute."""
    names = hook(module, attribute)
    # ("weight") without a comma is a text; its letters are no names.
    if isinstance(names, str):
        names = (names,)
    ids: set[int] = set()
    for name in names:
        ids |= {id(parameter) for parameter in _parameters_of(module, name)}
    return ids


def _parameters_of(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """Yields the parameter of that name, or all those of the submodule; none where it is None."""
    part = getattr(module, name)
    if isinstance(part, nn.Module):
        yield from part.parameters()
    elif part is not None:
        yield part


def _initial_state(parameter: nn.Parameter, fused: bool) -> dict[str, Tensor]:
    """Builds AdamW's state before the first step, as torch would make it during that step."""
    # Only the fused kernel reads the count on the device.
    device = parameter.device if fused else "cpu"
    return {
        "step": torch.zeros((), device=device, dtype=torch.float32),
        "exp_avg": empty_moment(parameter),
        "exp_avg_sq": empty_moment(parameter),
    }
