"""Leaves plans, exchanges, draws and kernels out of what torch.compile compiles."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

# Said to the compiler, which says it again where a graph ends for this reason.
LEFT_OUT = "Longspan computes it as written: an exchange, a plan, a draw or a kernel"


def as_written(function: Callable[P, R]) -> Callable[P, R]:
    """Returns a function that torch.compile calls and does not look into."""
    return cast(Callable[P, R], torch.compiler.disable(function, reason=LEFT_OUT))
