"""Applies all changes that turn a model written for one device into a model in training.

Their order matters. Context and expert parallelism come first (primitives are swapped for drivers),
then tiles of tokens and groups of heads, activation checkpointing (so that a recomputed block
communicates as it did), compilation, activation offload, and parameter sharding last: FSDP2 gathers
a block's parameters around all of it, once for the recomputation.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from models.primitives.attention_tape import tapes
from models.primitives.pooled_attention import PointAttention, PooledAttention
from models.primitives.softmax import Softmax
from parallel.activation_offload import ActivationOffload
from parallel.collectives import Communicator
from parallel.compilation import compile_block
from parallel.context_parallel import apply_context_parallel
from parallel.engines.base import Engine, blocks_of
from parallel.head_groups import apply_head_groups
from parallel.tiles import apply_tiles


def parallelize(
    model: nn.Module,
    engine: Engine,
    *,
    method: str = "auto",
    offload: ActivationOffload | None = None,
    tiles: int | None = None,
    head_groups: int | None = None,
) -> Communicator | None:
    """Applies parallelism, checkpointing, compilation and sharding as the engine's settings say.

    Afterwards `engine.model` is what to call.

    Args:
        model: as built, best on the meta device. Parameter names never change.
        method: how attention is shared over the ranks of a context group, see
            parallel.context_parallel.
        offload: sends to the host what blocks save for backward; None leaves it on the device.
        tiles: into how many tiles of tokens feed-forward layers and losses are cut
            (parallel/tiles.py); None computes all tokens at once.
        head_groups: into how many groups of heads attention is cut (parallel/head_groups.py); None
            computes all heads at once.

    Returns:
        The communicator of the drivers, or None where neither sequences nor experts are shared.
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
    if tiles is not None:
        apply_tiles(model, tiles)
    if head_groups is not None:
        apply_head_groups(model, head_groups)
    for block in blocks_of(model):
        if engine.checkpointing == "full":
            block.forward = compute_again(block.forward)
        elif engine.checkpointing == "selective":
            block.forward = compute_all_but_attention_again(block, offload)
        if engine.compile:
            engine.compiled_blocks.append(compile_block(block))
        if offload is not None:
            block.forward = offload.around(block)
    engine.wrap(model)
    return communicator


def compute_again(forward: Callable) -> Callable:
    """Returns `forward` with full activation checkpointing.

    Only its inputs are kept; the rest is recomputed in backward (Chen et al. 2016,
    arXiv:1604.06174).

    The state of random generators is not kept: no step draws from one (dropout is a function of the
    token's address).
    """
    return partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def compute_all_but_attention_again(
    block: nn.Module, offload: ActivationOffload | None = None
) -> Callable:
    """Returns the forward of `block` with selective activation checkpointing.

    As `compute_again`, but the output and lse of every attention are kept, so that keys do not go
    round the ring a third time. Under Ulysses attention is not recomputed, but heads and tokens are
    traded again.
    """
    leaves = []
    for leaf in block.modules():
        if isinstance(leaf, Softmax | PooledAttention | PointAttention):
            leaves.append(leaf.kept)

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
