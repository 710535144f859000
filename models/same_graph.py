"""A gradient for parameters that only some rows need, so that every rank builds the same graph
whatever its rows.

Engines reduce gradients over ranks: a parameter that has one here and none there upsets what they
exchange, or is counted as unused on one number of ranks and as used on another.
"""

from typing import Any

import torch
from torch import Tensor


def tied(x: Tensor, *parameters: Tensor) -> Tensor:
    """`x` itself; through it the parameters get a gradient of zero beside those that they have."""
    return _Tied.apply(x, *parameters)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.shapes = [parameter.shape for parameter in parameters]
        ctx.dtypes = [parameter.dtype for parameter in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (grad,) = grads
        zeros = (
            grad.new_zeros((), dtype=dtype).expand(shape)
            for shape, dtype in zip(ctx.shapes, ctx.dtypes, strict=True)
        )
        return grad, *zeros
