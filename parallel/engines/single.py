"""Engine that keeps every parameter whole on every rank and sums the gradients, on any number of
ranks.

Only stacks of experts are not whole under expert parallelism: a rank has its own experts, and sums
their gradients over the ranks that hold the same ones.

In bfloat16 the model holds bfloat16 copies and the optimiser float32 masters beside it. (Casting
inside the forward would be undone by the time that activation checkpointing computes a block again;
copies are there for both.)
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.engines.base import Engine, blocks_of
from parallel.engines.expert_sharding import share_experts
from parallel.engines.gradients import all_reduce_gradients
from parallel.engines.materialize import materialize


class Single(Engine):
    """All parameters on all ranks; one all-reduce of the gradients a step, in flat buckets, in the
    stored dtype."""

    def _place(self, model: nn.Module) -> nn.Module:
        share_experts(model, self.mesh, self.computed)
        self.drawn = materialize(model, self.mesh.device, self.seed, self.how)
        self.copies: list[tuple[nn.Parameter, nn.Parameter]] = []
        if self.precision == "bfloat16":
            for module in (model, *blocks_of(model)):
                module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        return model

    def _stored(self) -> dict[str, nn.Parameter]:
        computed = dict(self.model.named_parameters())
        if self.precision != "bfloat16":
            return computed
        masters = {  # a stack of experts is its own master: it is cast where it is used
            name: p if isinstance(p, DTensor) else nn.Parameter(p.detach(), p.requires_grad)
            for name, p in computed.items()
        }
        self.copies = [
            (computed[name], master)
            for name, master in masters.items()
            if not isinstance(master, DTensor)
        ]
        for copy, master in self.copies:
            copy.data = master.detach().to(torch.bfloat16)
        return masters

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See Engine.backward. Gradients of micro-batches add up in the stored dtype."""
        loss.backward()
        for copy, master in self.copies:
            if copy.grad is not None:
                grad = copy.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                copy.grad = None
        if last:
            trained = [p for p in self.parameters.values() if p.requires_grad]
            all_reduce_gradients(trained, self.mesh.world.group, self.mesh.expert_data.group)

    def step(self, learning_rate: float) -> None:
        """See Engine.step."""
        super().step(learning_rate)
        self._refresh()

    def load(self, state: Any) -> None:
        """See Engine.load."""
        super().load(state)
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        """Bring the copies up to date with their masters."""
        for copy, master in self.copies:
            copy.copy_(master)


def cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Float inputs of the model and of each block in bfloat16, as FSDP2's mixed precision has
    them."""
    return _cast(args), _cast(kwargs)


def _cast(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.bfloat16) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _cast(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_cast, value))
    return type(value)(map(_cast, value)) if isinstance(value, list | tuple) else value
