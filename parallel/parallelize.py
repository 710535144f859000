"""From a model written for one device to a model in training: every change to it, in the one order
that works.

Sequence and experts first (leaves are swapped), then activation checkpointing (so that a block
computed again exchanges as it did), then compilation, then the host's memory for what is saved,
then sharding: FSDP2 gathers a block's parameters around the whole, once for what is computed again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.primitives.attention_tape import tapes
from models.primitives.softmax import Softmax
from parallel.activation_offload import ActivationOffload
from parallel.collectives import Communicator
from parallel.context_parallel import OPAQUE, apply_context_parallel
from parallel.engines.base import Engine, blocks_of


def parallelize(
    model: nn.Module,
    engine: Engine,
    *,
    method: str = "auto",
    offload: ActivationOffload | None = None,
) -> Communicator | None:
    """Spread, checkpoint, compile and shard `model` as the engine's settings say; `engine.model` is
    what to call then.

    Args:
        model: as built, best on the meta device. Parameter names never change.
        method: how attention is shared over the ranks of a context group, see
            parallel.context_parallel.
        offload: sends to the host what blocks save for backward; None leaves it on the device.

    Returns:
        The wire that the drivers send over, or None where a rank has its sequence and all experts
        to itself.
    """
    mesh = engine.mesh
    communicator = None
    shares_rows = mesh.context.size > 1
    if shares_rows or mesh.experts.group is not None:
        communicator = apply_context_parallel(
            model,
            mesh.context.group if shares_rows else None,
            method,
            grid=mesh.grid if shares_rows else None,
            experts=mesh.experts.group,
        )
    for block in blocks_of(model):
        if engine.checkpointing == "full":
            block.forward = compute_again(block.forward)
        elif engine.checkpointing == "selective":
            block.forward = compute_all_but_attention_again(block, offload)
        if engine.compile:
            hide(block)
            block.forward = torch.compile(
                block.forward
            )  # no module is put in between: names stay as they are
        if offload is not None:
            block.forward = offload.around(block)
    engine.wrap(model)
    return communicator


def hide(block: nn.Module) -> None:
    """Keep the compiler out of a block's primitives and their drivers: it compiles what lies
    between them."""
    for module in block.modules():
        if isinstance(module, OPAQUE):
            module.forward = torch.compiler.disable(module.forward)


def compute_again(forward: Callable) -> Callable:
    """Keep only the inputs of `forward`; compute the rest again in backward (Chen et al. 2016,
    arXiv:1604.06174).

    The state of random generators is not kept: no step draws from one (dropout is a function of the
    token's address).
    """
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def compute_all_but_attention_again(
    block: nn.Module, offload: ActivationOffload | None = None
) -> Callable:
    """As `compute_again`, but every attention's mean and mass are kept: keys do not go round the
    ring a third time.

    Where heads are traded for tokens, attention is not computed again, but the trade is made again.
    """
    leaves = [leaf.kept for leaf in block.modules() if isinstance(leaf, Softmax)]

    def contexts() -> tuple[Any, Any]:
        pair = tapes(leaves)
        return pair if offload is None else offload.tapes(block, pair)

    return partial(
        checkpoint,
        block.forward,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=contexts,
    )
