"""A differentiable exchange of flat tensors: what comes back as gradient goes the way it came."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.moves import Wire


def exchange(x: Tensor, wire: Wire, given: Sequence[int], taken: Sequence[int], name: str) -> Tensor:
    """[sum(given), ...] -> [sum(taken), ...]: the first given[0] entries to rank 0, and so on; taken[r] come from rank r.

    Args:
        given, taken: numbers of entries; what this rank gives to r is what r takes from it.
        name: under which the bytes are counted, those of backward with " backward" after it.
    """
    return _Exchange.apply(x, wire, tuple(given), tuple(taken), name)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, wire: Wire, given: tuple[int, ...], taken: tuple[int, ...], name: str) -> Tensor:
        ctx.args = wire, given, taken, name
        return _move(x, wire, given, taken, name)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):
        wire, given, taken, name = ctx.args
        return _move(grad, wire, taken, given, f"{name} backward"), None, None, None, None


def _move(x: Tensor, wire: Wire, given: tuple[int, ...], taken: tuple[int, ...], name: str) -> Tensor:
    each = x.shape[1:].numel()
    parts = wire.exchange(x.contiguous().split(list(given)), [n * each for n in taken], name)
    return torch.cat(parts).view(sum(taken), *x.shape[1:])
