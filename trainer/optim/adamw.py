"""The optimiser: AdamW, with weight decay only where a parameter is a matrix that multiplies
activations.

A module may say of its parameters, or of whole modules in it, that weight decay acts on them
although no linear layer of torch has them (`decayed`, names), that it leaves them alone
(`undecayed`, names), and that they learn at another pace (`rates`, {name: factor of the learning
rate}).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.declared import declared

LINEAR = (nn.Linear, nn.Bilinear, _ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101); conf/optim names it and
    its settings.

    Args:
        learning_rate: at the peak of the schedule.
        betas: how slowly the two moments forget.
        weight_decay: per step, times the learning rate; see `decayed` for what it acts on.
        max_grad_norm: largest global norm of the gradient; 0 = no clipping.
        auxiliary_weight: of the losses that layers have beside the language loss
            (models/auxiliary.py).

    Raises:
        ValueError: a number out of its range.
    """

    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    auxiliary_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"optim.{name}={getattr(self, name)} must be a positive number")
        for name in ("weight_decay", "max_grad_norm", "auxiliary_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"optim.{name}={getattr(self, name)} must be 0 (off) or a positive number"
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optim.betas={list(self.betas)} must be two numbers from 0 up to, not with, 1"
            )

    def __call__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> torch.optim.AdamW:
        """The torch optimiser over `parameters`, whose names are those of `model`; its state exists
        from the start.

        A group's "rate" is what its learning rate is to be in units of the model's; who sets "lr"
        multiplies by it.

        Fused on GPUs. On CPUs one parameter at a time: the fused kernel's last bits depend on where
        a tensor was cut (6 of 10007 elements after 5 steps, in 770 pieces against one), and foreach
        is slower than the plain loop there.
        """
        trained = {
            name: parameter for name, parameter in parameters.items() if parameter.requires_grad
        }
        decays = decayed_parameters(model)
        rate = lr_scales(model)
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in trained.items():
            groups.setdefault((rate.get(name, 1.0), name in decays), []).append(parameter)
        fused = all(parameter.device.type == "cuda" for parameter in trained.values())
        optimiser = torch.optim.AdamW(
            [
                {
                    "params": params,
                    "rate": factor,
                    "weight_decay": self.weight_decay if decay else 0.0,
                }
                for (factor, decay), params in sorted(
                    groups.items(), key=lambda group: (group[0][0] != 1, not group[0][1])
                )
            ],
            lr=self.learning_rate,
            betas=self.betas,
            eps=self.eps,
            fused=fused,
            foreach=False,
        )
        for parameter in trained.values():
            optimiser.state[parameter] = _no_moments(parameter, fused)
        return optimiser


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay acts on.

    The weights of linear layers, convolutions and recurrent cells of torch, and what a module lists
    in its `decayed` (stacks of experts), except what a module lists in its `undecayed` (networks
    that write filters). Other parameters stay as they are, however many dims they have: norms,
    biases by head or by place, tables of positions, mixing coefficients, memory tokens. Embeddings
    are left out as in OLMo 2 (arXiv:2501.00656): decay shrinks them, and with them grow the
    gradients of the first layers. A tied embedding counts as an embedding.
    """
    chosen: set[int] = set()
    left_out: set[int] = set()
    for module in model.modules():
        if isinstance(module, LINEAR):
            own = module.named_parameters(recurse=False)
            chosen |= {id(p) for name, p in own if "weight" in name and p.ndim >= 2}
        elif isinstance(module, EMBEDDINGS):
            left_out.add(id(module.weight))
        chosen |= _listed(module, "decayed")
        left_out |= _listed(module, "undecayed")
    return {name for name, p in model.named_parameters() if id(p) in chosen - left_out}


def lr_scales(model: nn.Module) -> dict[str, float]:
    """By name, the factor of the learning rate of the parameters for which a module has one in its
    `rates`."""
    found: dict[int, float] = {}
    for module in model.modules():
        for name, factor in declared(module, "rates", Mapping, {}).items():
            found |= {id(p): float(factor) for p in _within(module, name)}
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def _listed(module: nn.Module, attribute: str) -> set[int]:
    """Ids of the parameters that the module names in a tuple, list or set of that name, or in one
    word."""
    names = declared(module, attribute, (tuple, list, set, frozenset, str), ())
    names = (names,) if isinstance(names, str) else names
    return {id(parameter) for name in names for parameter in _within(module, name)}


def _within(module: nn.Module, name: str) -> Iterator[nn.Parameter]:
    """The parameter of that name, or all those of the module of that name; none where it is
    None."""
    part = getattr(module, name)
    if isinstance(part, nn.Module):
        yield from part.parameters()
    elif part is not None:
        yield part


def _no_moments(parameter: nn.Parameter, fused: bool) -> dict[str, Tensor]:
    """AdamW's state before the first step, as torch would make it during that step."""
    count = torch.zeros((), device=parameter.device if fused else "cpu", dtype=torch.float32)
    return {"step": count, "exp_avg": nothing_yet(parameter), "exp_avg_sq": nothing_yet(parameter)}


def nothing_yet(parameter: nn.Parameter) -> Tensor:
    """Zeros like a parameter, sharded as it is."""
    return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
