"""A parameter that a rank did not need is reduced as zeros, so that all ranks exchange the same
under FSDP2."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.distributed.fsdp import FSDPModule


def reduce_unused(module: FSDPModule) -> None:
    """Let the unit hand in zeros for what got no gradient on this rank and may have got one on
    another.

    From torch 2.13 on FSDP2 has a setting for that. Before, it left such a parameter out of the
    exchange, and ranks that leave out different ones hang or add up different parameters; there
    zeros are put in before the unit's exchange.
    """
    if hasattr(module, "set_reduce_scatter_unused_params"):
        module.set_reduce_scatter_unused_params(True)
        return
    state = cast(Any, module)._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in groups:
        if group is not None:  # a unit without parameters of its own has none
            group.post_backward = _with_zeros(group, group.post_backward)


def _with_zeros(group: Any, exchange: Callable[..., Any]) -> Callable[..., Any]:
    def post_backward(*args: Any) -> Any:
        whole = [held for held in group.fsdp_params if hasattr(held, "_unsharded_param")]
        if group.reduce_grads:  # not between micro-batches
            for held in whole:
                parameter = held.unsharded_param
                if (
                    parameter.requires_grad
                    and parameter.grad is None
                    and held.unsharded_accumulated_grad is None
                ):
                    parameter.grad = torch.zeros_like(parameter)
        return exchange(*args)

    return post_backward
