"""Drops tokens from the middle of rows that decode, and moves those behind them up.

Letters: B rows, S slots.
"""

import torch
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.base import blanked, taken
from models.cache.turning import Turn, cannot_turn
from models.primitive import Primitive
from models.primitives.causal_conv import CausalConv
from models.primitives.expert_dispatch import ExpertDispatch
from models.primitives.softmax import Softmax
from models.span import PADDING, Span

# What a shift leaves right: keys and values move, tails of short filters only lose their places.
SHIFTED = (Softmax, CausalConv, ExpertDispatch)


def cannot_shift(model: nn.Module, factory: KVCacheFactory) -> list[str]:
    """Returns one sentence for each reason why `overflow=shift` has no meaning for a model."""
    if not isinstance(factory, Contiguous):
        kind = type(factory).__name__
        return [
            f"overflow=shift turns cached keys, but {kind} does not hold all of them as they were"
            " computed; use cache=contiguous, or overflow=recompute"
        ]
    sentences = []
    for path, module in model.named_modules():
        if isinstance(module, Primitive) and not isinstance(module, SHIFTED):
            kind = type(module).__name__
            sentences.append(
                f"overflow=shift: {path} ({kind}) holds a state from which no token can be taken"
                " out again; use overflow=recompute"
            )
    if sentences:
        return sentences
    return [f"overflow=shift: {reason}" for reason in cannot_turn(model)]


@torch.no_grad()
def shift(state: DecodingState, start: Tensor, stop: Tensor, turns: dict[str, Turn]) -> None:
    """Drops positions `start` to `stop` of the last document of each row.

    Args:
        state: between two pieces.
        start, stop: [B] int64; a row where they are equal stays as it is.
        turns: from models.cache.turning.turns.
    """
    moves: dict[int, tuple[Tensor, Tensor, Tensor, Span]] = {}
    for table in set(state.slots.values()):
        moves[id(table)] = _move(table.read(), start, stop)
    payloads = {}
    for name, cache in state.caches.items():
        order, filled, by, _ = moves[id(state.slots[name])]
        held, _ = cache.export_state()
        kept = [blanked(taken(tensor, order), filled) for tensor in held]
        place, _, _ = name.rpartition("#")
        payloads[name] = turns[place](kept, by)
    for table in set(state.slots.values()):
        table.restore(moves[id(table)][3])
    for name, cache in state.caches.items():
        cache.import_state(payloads[name], state.slots[name].read())
    for length, span in state.addresses.items():
        state.addresses[length] = Span(span.pos - _later(span, start, stop), span.doc, span.role)


def _move(span: Span, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor, Span]:
    """Returns (the slots that stay in their new order, which of them are filled, by how many tokens
    each moves on, its new address)."""
    back = _later(span, start, stop)
    gone = _current(span) & (span.pos >= start[:, None]) & (back == 0) & (span.pos < stop[:, None])
    stays = span.valid() & ~gone
    most = int(stays.sum(1).max())
    order = (~stays).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    filled = stays.gather(1, order)
    by = -back.gather(1, order)
    moved = span.map(lambda tensor: tensor.gather(1, order))
    doc = moved.doc.masked_fill(~filled, PADDING)
    return order, filled, by, Span(moved.pos + by, doc, moved.role)


def _current(span: Span) -> Tensor:
    """[B, S] bool: tokens of the last document of each row."""
    return (span.doc == span.doc.amax(1, keepdim=True)) & span.valid()


def _later(span: Span, start: Tensor, stop: Tensor) -> Tensor:
    """[B, S] tokens by which each token moves back: those that were dropped before it."""
    behind = _current(span) & (span.pos >= stop[:, None])
    return torch.where(behind, (stop - start)[:, None], 0)
