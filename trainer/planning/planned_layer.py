"""Plans one layer, forward and backward, on one device: what a bench and tests hold plans against.

Letters: B rows, T tokens, W width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.span import Span
from parallel.engines.materialize import materialize
from trainer.planning.devices import Device
from trainer.planning.live_memory import LiveMemory
from trainer.planning.step_costs import StepCosts
from trainer.planning.step_plan import kernels_of
from trainer.planning.without_numbers.counted_kernels import counted_kernels
from trainer.planning.without_numbers.expected_pairs import expected_pairs
from trainer.planning.without_numbers.fake_arithmetic import FakeArithmetic
from trainer.planning.without_numbers.quick_placement import placed_without_numbers


class PlannedPass(NamedTuple):
    """A forward and a backward pass: the sums of what they compute and move, each."""

    forward: StepCosts
    backward: StepCosts

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.forward.total_seconds + self.backward.total_seconds


def plan_layer(
    build: Callable[[], nn.Module],
    shape: tuple[int, int, int],
    device: Device,
    precision: str = "float32",
    loss_of: Callable[[nn.Module, Tensor], Tensor] = lambda layer, output: output.sum(),
) -> PlannedPass:
    """Plans a layer over rows that are one document each.

    Args:
        build: makes the layer, which is called with (hidden [B, T, W], span).
        shape: (B, T, W).
        device: that it runs on.
        precision: of its numbers.
        loss_of: (layer, its output) -> what backward begins with.
    """
    dtype = getattr(torch, precision)
    with kernels_of(device), placed_without_numbers():
        with torch.device("meta"):
            layer = build().to(dtype)
        with FakeArithmetic(), LiveMemory() as live:
            materialize(layer, torch.device("cpu"), 0)
            hidden = torch.empty(shape, dtype=dtype).requires_grad_()
            costs = StepCosts(device, precision)

            def observe(func: Any, args: Any, result: Any, kwargs: Any) -> None:
                costs.note(func, args, result, kwargs)

            live.observe = observe
            with expected_pairs(costs, device), counted_kernels(costs, device):
                loss = loss_of(layer, layer(hidden, Span.line(*shape[:2])))
                forward = costs.copy()
                loss.backward()
            costs.add(forward, -1)
            return PlannedPass(forward, costs)
