"""Compares what texts will need of the memory at hand, before the first token.

What a token costs in each attention is measured: the shortest prompt is read once. What a mask
shows to no later query is not counted, nor what `cache=` evicts, so the need is a lower bound: a
text that is refused would not have fitted.
"""

import heapq
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from models.cache.base import KVCacheFactory
from models.cache.contiguous import Contiguous, ContiguousCache
from models.masks.algebra import EMPTY, FAR, FULL, Bounds, Mask
from models.span import TEXT
from trainer.decoding.token_decoder import TokenDecoder

CGROUP = Path("/sys/fs/cgroup")
LOOKS = 4096  # stretches of a text that are looked at


class TokenCost(NamedTuple):
    """Numbers that one attention holds of a token, as long as a mask shows it."""

    mask: Mask
    numbers: int
    itemsize: int


class RowCost(NamedTuple):
    """Bytes of a row: of each of its tokens, by attention, and beside them."""

    attentions: list[TokenCost]
    fixed: int

    def bytes(self, tokens: int, cache: KVCacheFactory) -> int:
        """Returns the least bytes of a row of so many tokens."""
        held: dict[Mask, int] = {}
        total = self.fixed
        for mask, numbers, itemsize in self.attentions:
            if mask not in held:
                held[mask] = tokens_held(mask, tokens)
            total += cache.least_bytes(held[mask], numbers, itemsize)
        return total


def measured(model: nn.Module) -> RowCost:
    """Reads the shortest prompt that the model takes, and returns what a row of it holds."""
    decoder = TokenDecoder(model, Contiguous(block=1))
    prompt = [0] * max(1, decoder.whole)
    decoder.feed([prompt])
    costs = []
    of_tokens = 0
    for cache in decoder.state.caches.values():
        assert isinstance(cache, ContiguousCache)
        of_tokens += cache.bytes()
        for tensor in cache.tensors:
            numbers = tensor[:, 0].numel()
            costs.append(TokenCost(cache.slots.mask, numbers, tensor.element_size()))
    return RowCost(costs, decoder.bytes() - of_tokens)


def tokens_held(mask: Mask, tokens: int) -> int:
    """Returns how many of a document's first tokens a later query of it may still read.

    Stretches that are read in part are halved, the longest first, LOOKS times; what is undecided
    then counts. A cache decides by coarser stretches, so it holds no less.
    """
    later = Bounds(tokens, FAR, 0, 0, TEXT, TEXT, False)
    held = 0
    undecided = [(-tokens, 0, tokens)]
    for _ in range(LOOKS):
        if not undecided:
            break
        _, start, stop = heapq.heappop(undecided)
        seen = mask.coverage(later, Bounds(start, stop - 1, 0, 0, TEXT, TEXT, False))
        if seen == FULL or (seen != EMPTY and stop - start == 1):
            held += stop - start
        elif seen != EMPTY:
            middle = (start + stop) // 2
            heapq.heappush(undecided, (start - middle, start, middle))
            heapq.heappush(undecided, (middle - stop, middle, stop))
    return held + sum(stop - start for _, start, stop in undecided)


def memory_at_hand(device: torch.device) -> int:
    """Returns the bytes that are free on a device; for the CPU, within the limit of its container
    too."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return min(free, max(0, limit - used))


def check_room(
    model: nn.Module,
    cache: KVCacheFactory,
    lengths: Sequence[int],
    rows: int,
    *,
    ranks: int = 1,
    free: int | None = None,
) -> None:
    """Refuses texts that the memory at hand does not hold.

    Args:
        model: whole, on the device that it will run on.
        lengths: tokens of each text at its end, its prompt among them.
        rows: texts that run at once.
        ranks: among which the tokens of a row lie.
        free: bytes at hand; None: they are looked up.

    Raises:
        ValueError: with the number of tokens that would fit.
    """
    if cache.bounded:  # rows wait for room
        return
    longest = sorted(lengths, reverse=True)[:rows]
    if free is None:
        free = memory_at_hand(next(model.parameters()).device)
    cost = measured(model)
    share = 1 if cache.replicated else ranks
    needed = sum(cost.bytes(length, cache) for length in longest) // share
    if needed <= free:
        return
    fits = 0
    too_many = longest[0] + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if len(longest) * cost.bytes(middle, cache) // share <= free:
            fits = middle
        else:
            too_many = middle
    raise ValueError(
        f"{len(longest)} texts of up to {longest[0]} tokens hold {needed / 2**20:,.1f} MiB at once,"
        f" and {free / 2**20:,.1f} MiB are free: {fits} tokens of each would fit, prompts among"
        " them; ask for fewer with tokens=, for fewer texts at once with rows=, or take another"
        " cache="
    )
