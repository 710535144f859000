"""Muon: matrices step by their orthogonalized momentum, and AdamW updates all other parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from parallel.engines.optimizer_offload import empty_moment
from trainer.optim.adamw import AdamW, decayed_parameters

# Jordan's: they bring every singular value near 1 in 5 iterations.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
TINY = 1e-7


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) on matrices, AdamW on the rest.

    Updates are scaled as in Moonlight (Liu et al. 2025, arXiv:2502.16982): 0.2 x sqrt(larger side)
    x a matrix of singular values near 1, the size of AdamW's updates, so that learning rate and
    weight decay are the same for all parameters. `matrices` says which parameters Muon takes.

    Unlike torch.optim.Muon, which iterates in bfloat16, ours iterates in the parameter's own dtype,
    and over the whole matrix wherever it is sharded: the update then depends neither on the
    sharding nor on the last bits of a gradient. The price: each matrix is gathered once a step, and
    every rank iterates on all of them.

    Args:
        momentum: decay rate of the gradient's mean; Nesterov's look-ahead is always taken.
        iterations: of Newton and Schulz.
        others: as for AdamW; betas and eps apply to the parameters that AdamW takes.

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
        """Builds the optimizer as AdamW does; the state of a matrix is its `momentum_buffer`."""
        matrix_names = matrices(model)
        matrix_parameters: dict[str, nn.Parameter] = {}
        other_parameters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if name not in matrix_names:
                other_parameters[name] = parameter
            elif parameter.requires_grad:
                matrix_parameters[name] = parameter
        adamw = super().__call__(model, other_parameters)
        # torch refuses an optimizer without parameters.
        if not matrix_parameters:
            return adamw
        groups = self.grouped(model, matrix_parameters)
        return _MuonAndAdamW(
            [self.group(group_parameters, key) for key, group_parameters in groups.items()],
            adamw,
            {"lr": self.learning_rate, "momentum": self.momentum, "iterations": self.iterations},
        )


class _MuonAndAdamW(torch.optim.Optimizer):
    """Muon's groups followed by those of an AdamW, with one state for both.

    Engines, checkpoints and schedules see one optimizer.

    Args:
        groups: Muon's.
        rest: the AdamW of all other parameters.
        settings: defaults of Muon's groups.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rest: torch.optim.AdamW, settings: dict[str, Any]
    ):
        super().__init__(groups, settings)
        self.rest = rest
        self.own = list(self.param_groups)
        # The same dicts, not copies: a learning rate that is set here reaches the AdamW.
        self.param_groups += rest.param_groups
        for group in self.own:
            for parameter in group["params"]:
                self.state[parameter] = {"momentum_buffer": empty_moment(parameter)}
        self.state.update(rest.state)
        rest.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient."""
        self.rest.step()
        for group in self.own:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[parameter]["momentum_buffer"]
        momentum = buffer.lerp_(gradient, 1 - group["momentum"])
        look_ahead = gradient.lerp(momentum, group["momentum"])
        # Singular values belong to the whole matrix, so a sharded one is gathered first.
        matrix = look_ahead.full_tensor() if isinstance(look_ahead, DTensor) else look_ahead
        update = orthogonalize(matrix, group["iterations"])
        if isinstance(look_ahead, DTensor):
            # src_data_rank=None: every rank has computed the same update, nothing is sent.
            update = distribute_tensor(
                update, look_ahead.device_mesh, look_ahead.placements, src_data_rank=None
            )
        size = 0.2 * max(matrix.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"] * size)


def orthogonalize(matrix: Tensor, iterations: int) -> Tensor:
    """Brings the singular values of a matrix to between about 0.7 and 1.2, keeping its vectors.

    Iterates x <- a x + b (x x') x + c (x x')^2 x (Newton and Schulz) from the matrix divided by its
    Frobenius norm. A matrix of zeros stays one.

    Args:
        matrix: [N, M].
        iterations: number of steps.

    Returns:
        [N, M].
    """
    a, b, c = COEFFICIENTS
    # x x' has the side of x's rows: the transpose makes that the shorter one.
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / x.norm().clamp(min=TINY)
    for _ in range(iterations):
        square = x @ x.mT
        polynomial = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def matrices(model: nn.Module) -> set[str]:
    """Returns the names of the parameters that Muon takes.

    These are the weights of linear layers that decay, without the output head (`model.head`). AdamW
    takes the rest: embeddings and what is tied to them, the head, vectors, filters, and stacks of
    experts.
    """
    head = getattr(model, "head", None)
    linear: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear.add(id(module.weight))
    names: set[str] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in linear and parameter.ndim == 2:
            names.add(name)
    # What is tied to an embedding, or declared `undecayed`, leaves here.
    return names & decayed_parameters(model)
