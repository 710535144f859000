"""Blocks whose forward is compiled, and may be uncompiled again where that turns out faster.

What lies between primitives is compiled; exchanges, plans and kernels are not
(`parallel.context_parallel.OPAQUE`). On some machines that loses time, so the trainer measures both
and keeps the faster one (trainer/compile_trial.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from parallel.context_parallel import OPAQUE


class CompiledForward:
    """A forward in two forms, one of which serves.

    Attributes:
        enabled: whether the compiled form serves.
    """

    def __init__(self, forward: Callable[..., Any]):
        self.eager = forward
        self.compiled = torch.compile(forward)
        self.enabled = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes the block."""
        return (self.compiled if self.enabled else self.eager)(*args, **kwargs)


def compile_block(block: nn.Module) -> CompiledForward:
    """Compiles the forward of a block, which keeps its name and the names of its parameters."""
    for module in block.modules():
        if isinstance(module, OPAQUE):
            module.forward = torch.compiler.disable(module.forward)
    forward = CompiledForward(block.forward)
    # Compiling the function rather than the module keeps parameter names as they are.
    block.forward = forward
    return forward
