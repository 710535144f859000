"""Muon: matrices step by their orthogonalised momentum, and AdamW takes the rest."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.optim.adamw import AdamW, decayed_parameters, lr_scales, nothing_yet

COEFFICIENTS = (
    3.4445,
    -4.7750,
    2.0315,
)  # Jordan's: they bring every singular value near 1 in 5 iterations
TINY = 1e-7


@dataclass(frozen=True)
class Muon(AdamW):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon), scaled as in Moonlight (Liu et al.
    2025, arXiv:2502.16982).

    Which parameters: `matrices`. Their update has the size of AdamW's, 0.2 x sqrt(larger side) x a
    matrix of singular values near 1, so that learning rate and weight decay are the same for all.

    Args:
        momentum: how slowly the gradient's mean forgets; Nesterov's look ahead is always taken.
        iterations: of Newton and Schulz.
        others: as AdamW; betas and eps are of what AdamW takes.

    Unlike torch.optim.Muon, which iterates in bfloat16, ours does in the parameter's own type, and
    over the whole matrix
    wherever it is sharded: the update then depends neither on the cut nor on the last bits of a
    gradient. The price: each matrix is gathered once a step, and every rank iterates on all of
    them.

    Raises:
        ValueError: a number out of its range.
    """

    momentum: float = 0.95
    iterations: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.momentum < 1:
            raise ValueError(
                f"optim.momentum={self.momentum} must be a number from 0 up to, not with, 1"
            )
        if not 1 <= self.iterations <= 100:
            raise ValueError(
                f"optim.iterations={self.iterations} must be a number of iterations from 1 to 100;"
                " 5 is usual"
            )

    def __call__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> torch.optim.Optimizer:
        """As AdamW's; the state of a matrix is its `momentum_buffer`."""
        chosen = matrices(model)
        decays = decayed_parameters(model)
        rate = lr_scales(model)
        rest = super().__call__(
            model, {name: p for name, p in parameters.items() if name not in chosen}
        )
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if name in chosen and parameter.requires_grad:
                groups.setdefault((rate.get(name, 1.0), name in decays), []).append(parameter)
        if not groups:
            return rest
        return _MuonAndAdamW(
            [
                {
                    "params": params,
                    "rate": factor,
                    "weight_decay": self.weight_decay if decay else 0.0,
                }
                for (factor, decay), params in groups.items()
            ],
            rest,
            {"lr": self.learning_rate, "momentum": self.momentum, "iterations": self.iterations},
        )


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon's groups, then those of the AdamW that it carries; one state."""

    def __init__(
        self, groups: list[dict[str, Any]], rest: torch.optim.AdamW, settings: dict[str, Any]
    ):
        super().__init__(groups, settings)
        self.rest = rest
        self.own = list(self.param_groups)
        self.param_groups += rest.param_groups
        for group in self.own:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": nothing_yet(parameter)}
        self.state.update(rest.state)
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.rest.step()
        for group in self.own:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        mean = self.state[parameter]["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        ahead = grad.lerp(mean, group["momentum"])
        whole = ahead.full_tensor() if isinstance(ahead, DTensor) else ahead
        size = 0.2 * max(whole.shape) ** 0.5
        update = orthogonalize(whole, group["iterations"])
        if isinstance(ahead, DTensor):
            update = distribute_tensor(
                update, ahead.device_mesh, ahead.placements, src_data_rank=None
            )
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(
            update, alpha=-group["lr"] * size
        )


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """[N, M] -> [N, M] with the same singular vectors and singular values between about 0.7 and
    1.2.

    Newton and Schulz's iteration x <- a x + b (x x') x + c (x x')^2 x on the matrix divided by its
    Frobenius norm. A matrix of zeros stays one.
    """
    a, b, c = COEFFICIENTS
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / x.norm().clamp(min=TINY)
    for _ in range(iterations):
        square = x @ x.mT
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def matrices(model: nn.Module) -> set[str]:
    """Names of the parameters that Muon takes: weights of linear layers that decay, but for the
    output head (`model.head`).

    The rest is AdamW's: embeddings and what is tied to them, the head, vectors, filters, and stacks
    of experts.
    """
    head = getattr(model, "head", None)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    return {
        name for name, p in model.named_parameters() if id(p) in linear and p.ndim == 2
    } & decayed_parameters(model)
