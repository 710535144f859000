"""Feed-forward layers, norms and the losses, computed in tiles of tokens.

What treats each token by itself can be computed for a few tokens at a time. Each tile keeps only
what comes in and is computed again in backward, so that what lies inside a feed-forward layer is in
memory for one tile, however many tokens there are. The residual stream, [B, T, width], remains
whole.

Source: the idea of blockwise feed-forward layers is Liu & Abbeel 2023 (arXiv:2305.19370), and of
losses in chunks Luo et al. 2024 (arXiv:2407.15892). Theirs are cut with attention or by the length
of the sequence; ours by a number of tiles that is the same on every rank.

Letters: B rows, T tokens of a row on this rank, N = B T.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.block import Block
from models.feedforward import NoFeedForward
from models.layer import has_hook
from models.primitive import Primitive
from models.span import Span

LOSSES = "losses_of"  # the method of a whole model that ends it with losses, token by token


def apply_tiles(model: nn.Module, tiles: int) -> int:
    """Has the feed-forward layers, the norms and the losses of a model computed in tiles.

    Layers that read several tokens, or that keep sums over them, are left as they are.

    Args:
        model: before its blocks are checkpointed, compiled or sharded.
        tiles: into how many tiles the tokens of a forward pass are cut; see `tile_count`.

    Returns:
        The number of feed-forward layers that are tiled.
    """
    count = 0
    for block in tileable_blocks(model):
        # A method of the class is replaced by one of the block that takes the same arguments.
        setattr(block, "transform", partial(in_tiles, block.transform, tiles))  # noqa: B010
        count += 1
    for module in model.modules():
        if isinstance(module, Block):
            # The other norms of a block are within its feed-forward half.
            for norm in (module.mixer_norm, module.mixer_post_norm):
                if norm is not None:
                    norm.forward = partial(_norm_in_tiles, norm.forward, tiles)
    losses_of = getattr(model, LOSSES, None)
    if losses_of is not None:
        setattr(model, LOSSES, partial(in_tiles, losses_of, tiles))
    return count


def tileable_blocks(model: nn.Module) -> Iterator[Block]:
    """Yields the blocks whose feed-forward layer treats each token by itself."""
    for module in model.modules():
        if isinstance(module, Block) and _is_token_wise(module.feedforward):
            yield module


def tile_count(tokens: int, tile_tokens: int) -> int:
    """Returns the number of tiles of at most `tile_tokens` tokens.

    Args:
        tokens: that a rank computes at once, as the config has it. Never those of a batch at hand:
            every rank must cut into equally many tiles, because an engine may gather parameters
            for each of them.
        tile_tokens: engine.tile_tokens.
    """
    return max(1, -(-tokens // tile_tokens))


def _is_token_wise(feedforward: nn.Module) -> bool:
    if isinstance(feedforward, NoFeedForward):
        return False
    for module in feedforward.modules():
        # A tile is computed twice, so sums over tokens would count it twice.
        keeps_sums = has_hook(module, "auxiliary") or has_hook(module, "auxiliary_sums")
        if isinstance(module, Primitive) or keeps_sums:
            return False
    return True


def in_tiles(
    compute: Callable[[Tensor, Any], Tensor], tiles: int, hidden: Tensor, addresses: Span | Tensor
) -> Tensor:
    """Returns compute(hidden, addresses), tile by tile; each is computed again in backward.

    Args:
        compute: (hidden [1, n, W], addresses [1, n]) -> [1, n, ...], each token by itself.
        tiles: their number; fewer only where there are fewer tokens.
        hidden: [B, T, W].
        addresses: a Span, or a tensor [B, T].
    """
    rows, tokens = hidden.shape[:2]
    count = max(1, min(tiles, rows * tokens))
    # Tokens do not read one another, so the rows may lie end to end. Slices would each give a
    # gradient of the size of all tokens; what comes of one split is put together once.
    hidden_tiles = hidden.flatten(0, 1)[None].tensor_split(count, 1)
    address_tiles = _split_addresses(addresses, count)
    computed = []
    for tile in zip(hidden_tiles, address_tiles, strict=True):
        if torch.is_grad_enabled():
            result = checkpoint(compute, *tile, use_reentrant=False, preserve_rng_state=False)
        else:
            result = compute(*tile)
        computed.append(result)
    whole = torch.cat(computed, 1)
    if rows == 1:
        return whole
    # A block and a model hand out no view, because FSDP2 hooks what they hand out.
    return whole.unflatten(1, (rows, tokens))[0].clone()


def _norm_in_tiles(norm: Callable[[Tensor], Tensor], tiles: int, hidden: Tensor) -> Tensor:
    """Returns norm(hidden), [B, T, W]: a norm computes wide, and so do six tensors of its
    gradient."""
    unused = hidden.new_empty(hidden.shape[:2])
    return in_tiles(lambda tile, _: norm(tile), tiles, hidden, unused)


def _split_addresses(addresses: Span | Tensor, count: int) -> list[Any]:
    """Cuts a Span or targets, [B, T], as the tokens are cut, into [1, n] each."""
    if isinstance(addresses, Tensor):
        return list(addresses.reshape(1, -1).tensor_split(count, 1))
    fields = [field.reshape(1, -1).tensor_split(count, 1) for field in addresses.addresses()]
    return [Span(*tile) for tile in zip(*fields, strict=True)]
