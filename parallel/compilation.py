"""Blocks whose forward is compiled, and may be uncompiled again where that turns out faster.

What lies between primitives is compiled; exchanges, plans and kernels are not
(`parallel.context_parallel.OPAQUE`). On some machines that loses time, so the trainer measures both
and keeps the faster one (trainer/compile_trial.py).
"""

from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._dynamo.utils import counters

from models.as_written import LEFT_OUT, as_written
from parallel.context_parallel import OPAQUE


class GraphBreaks(NamedTuple):
    """Counts of the graphs of this process and of their ends, by the compiler.

    Attributes:
        graphs: pieces that were compiled.
        left_out: breaks at what `compile_block` leaves out.
        others: breaks anywhere else, by the compiler's reason.
    """

    graphs: int
    left_out: int
    others: dict[str, int]

    def line(self) -> str:
        """Returns one line for the log."""
        text = f"{self.graphs} graphs, {self.left_out} breaks at exchanges and kernels"
        for reason, count in self.others.items():
            text += f", {count} elsewhere ({reason})"
        return text


def graph_breaks() -> GraphBreaks:
    """Counts the graph breaks of this process; a frame that is compiled anew counts anew."""
    left_out = 0
    others = {}
    for reason, count in counters["graph_break"].items():
        if LEFT_OUT in reason:
            left_out += count
        else:
            others[reason.partition("\n")[0]] = count
    return GraphBreaks(counters["stats"]["unique_graphs"], left_out, others)


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
            _leave_out(module)
    forward = CompiledForward(block.forward)
    # Compiling the function rather than the module keeps parameter names as they are.
    block.forward = forward
    return forward


def _leave_out(module: nn.Module) -> None:
    """Keeps the compiler out of every method that a layer may call, not of `forward` alone."""
    names = set()
    for kind in type(module).__mro__[: type(module).__mro__.index(nn.Module)]:
        names |= {name for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    for name in sorted(names):
        if not name.startswith("_"):
            setattr(module, name, as_written(getattr(module, name)))
