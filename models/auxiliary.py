"""Losses that layers have beside the language loss, and layers that change with the step.

A layer that has such a loss leaves it in `auxiliary`, {name: [B, T] nats per token}, at each forward pass with gradients; a
layer that changes with the step has a method `begin(step)`. The trainer calls the two functions below.
"""

from torch import Tensor, nn


def begin(model: nn.Module, step: int) -> None:
    """Tell every layer which step comes next (the first is 1); what it does then is a function of that number alone."""
    for module in model.modules():
        told = getattr(module, "begin", None)
        if callable(told):
            told(step)


def auxiliary(model: nn.Module) -> dict[str, Tensor]:
    """Sums over the tokens at hand of what layers left in their last forward pass; taken away, so never counted twice.

    Linear in the tokens: to be divided by the global count of valid tokens, as the language loss is, and summed over ranks.
    """
    sums: dict[str, Tensor] = {}
    for module in model.modules():
        left = getattr(module, "auxiliary", None)
        if isinstance(left, dict):
            for name, losses in left.items():
                sums[name] = sums[name] + losses.sum() if name in sums else losses.sum()
            left.clear()
    return sums
