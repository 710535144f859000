"""From a model written for one device to a model in training: every change to it, in the one order that works.

Sequence first (it swaps leaves), then activation checkpointing (so that a block computed again exchanges as it did),
then compilation, then sharding: FSDP2 gathers a block's parameters around the whole, once for what is computed again.
"""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.engines.engine import Engine, blocks_of
from parallel.moves import Wire
from parallel.spread import spread


def place(model: nn.Module, engine: Engine, *, method: str = "auto") -> Wire | None:
    """Spread, checkpoint, compile and shard `model` as the engine's settings say; `engine.model` is what to call then.

    Args:
        model: as built, best on the meta device. Parameter names never change.
        method: how attention is shared over the ranks of a context group, see parallel.spread.

    Returns:
        The wire that the drivers send over, or None where a rank has its sequence to itself and nothing was swapped.
    """
    mesh, wire = engine.mesh, None
    if mesh.context_size > 1:
        grid = (mesh.heads_group, mesh.ring_group) if mesh.heads_group is not None else None
        wire = spread(model, mesh.context_group, method, grid=grid)
    if engine.checkpointing == "full":
        around(blocks_of(model), compute_again)
    if engine.compile:
        around(blocks_of(model), torch.compile)
    engine.wrap(model)
    return wire


def around(blocks: Iterable[nn.Module], change: Callable[[Callable], Callable]) -> None:
    """Replace each block's forward by change(forward). No module is put in between: names stay as they are."""
    for block in blocks:
        block.forward = change(block.forward)


def compute_again(forward: Callable) -> Callable:
    """Keep only the inputs of `forward`; compute the rest again in backward (Chen et al. 2016, arXiv:1604.06174).

    The state of random generators is not kept: no step draws from one (dropout is a function of the token's address).
    """
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
