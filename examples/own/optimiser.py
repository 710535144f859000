"""An optimiser of one's own:

python -m trainer optim._target_=examples.own.optimiser.Lion optim.learning_rate=1e-4
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trainer.optim.adamw import AdamW, empty_moment


@dataclass(frozen=True)
class Lion(AdamW):
    """Steps by the sign of the mean gradient (Chen et al. 2023, arXiv:2302.06675).

    AdamW sorts the parameters into groups of equal learning rate and weight decay; betas are the
    two weights of the mean, eps is of no use to it.
    """

    def __call__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> torch.optim.Optimizer:
        """Builds the optimizer of torch; frozen parameters are left out."""
        trained = {name: each for name, each in parameters.items() if each.requires_grad}
        return _Lion(self._groups(model, trained), self.learning_rate, self.betas)


class _Lion(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, object]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas})
        # A checkpoint is read into the state in place, also before the first step.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"mean": empty_moment(parameter)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every parameter that has a gradient, each element by itself.

        So a shard is updated as it would be within the whole.
        """
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter]["mean"]
                direction = mean.lerp(parameter.grad, 1 - first).sign()
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"])
                mean.lerp_(parameter.grad, 1 - second)
