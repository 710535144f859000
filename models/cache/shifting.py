"""Drops tokens from the middle of rows that decode, and moves those behind them up.

Letters: B rows, S slots.
"""

from typing import NamedTuple

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
from models.scores import Tensors
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

    Over ranks every rank turns the keys that it holds, and keeps them; the number of each row's
    last document is all that is exchanged.

    Args:
        state: between two pieces.
        start, stop: [B] int64; a row where they are equal stays as it is.
        turns: from models.cache.turning.turns.
    """
    last = state.largest(_last_document(state, start))
    dropped = Dropped(last[:, None], start[:, None], stop[:, None])
    moves: dict[int, Move] = {}
    for table in set(state.slots.values()):
        span = table.read()
        moves[id(table)] = _move(span, dropped)
    payloads = {}
    for name, cache in state.caches.items():
        held, _ = cache.export_state()
        payloads[name] = _moved(name, held, moves[id(state.slots[name])], turns)
    for table in set(state.slots.values()):
        table.restore(moves[id(table)].span)
    for name, cache in state.caches.items():
        cache.import_state(payloads[name], state.slots[name].read())
    imported: dict[int, Move] = {}
    for name, (held, span) in list(state.imported.items()):
        if id(span) not in imported:
            imported[id(span)] = _move(span, dropped)
        move = imported[id(span)]
        state.imported[name] = _moved(name, held, move, turns), move.span
    for length, span in state.addresses.items():
        state.addresses[length] = Span(span.pos - _later(span, dropped), span.doc, span.role)


class Dropped(NamedTuple):
    """The tokens that go, [B, 1] each: positions `start` to `stop` of document `doc`."""

    doc: Tensor
    start: Tensor
    stop: Tensor


class Move(NamedTuple):
    """The slots of a table that stay, and where their tokens move.

    Attributes:
        order: [B, K] int64, the slots that stay, in their new order.
        filled: [B, K] bool, which of them hold a token.
        by: [B, K] int64, tokens by which each moves on.
        span: [B, K] new addresses.
    """

    order: Tensor
    filled: Tensor
    by: Tensor
    span: Span


def _last_document(state: DecodingState, like: Tensor) -> Tensor:
    """[B] number of the last document of each row of which a token is held here; PADDING where
    there is none."""
    spans = [table.read() for table in set(state.slots.values())]
    spans += [span for _, span in state.imported.values()]
    last = torch.full_like(like, PADDING)[:, None]
    for span in [*spans, *state.addresses.values()]:
        last = torch.cat([last, span.doc], 1).amax(1, keepdim=True)
    return last[:, 0]


def _moved(name: str, held: Tensors, move: Move, turns: dict[str, Turn]) -> list[Tensor]:
    """Returns the payload [B, K, ...] of the slots that stay, at their new positions."""
    place, _, _ = name.rpartition("#")
    kept = [blanked(taken(tensor, move.order), move.filled) for tensor in held]
    return list(turns[place](kept, move.by))


def _move(span: Span, dropped: Dropped) -> Move:
    """Returns what happens to slots with these addresses [B, S]."""
    back = _later(span, dropped)
    inside = (span.pos >= dropped.start) & (span.pos < dropped.stop)
    stays = span.valid() & ~(inside & _in_last(span, dropped))
    most = int(stays.sum(1).max())
    order = (~stays).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    filled = stays.gather(1, order)
    by = -back.gather(1, order)
    moved = span.map(lambda tensor: tensor.gather(1, order))
    doc = moved.doc.masked_fill(~filled, PADDING)
    return Move(order, filled, by, Span(moved.pos + by, doc, moved.role))


def _in_last(span: Span, dropped: Dropped) -> Tensor:
    """[B, S] bool: tokens of the last document of each row."""
    return (span.doc == dropped.doc) & span.valid()


def _later(span: Span, dropped: Dropped) -> Tensor:
    """[B, S] tokens by which each token moves back: those that were dropped before it."""
    behind = _in_last(span, dropped) & (span.pos >= dropped.stop)
    return torch.where(behind, dropped.stop - dropped.start, 0)
