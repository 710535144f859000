"""Base of caches that evict: each row, or each key head of a row, holds a budget of tokens.

What is held stands in the order of the text. A subclass says which tokens are wanted once a piece
has been attended to. Tokens of a document that has ended are never wanted: no later query sees
them.

Letters: B rows, T tokens at hand, S slots, H query heads, G key heads, N = B G or B histories that
are kept apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.cache.base import KVCache, KVCacheFactory
from models.primitives.softmax import Softmax
from models.scores import Score, SharedValueScore, Tensors, WrappedScore
from models.span import PADDING, Span


class Eviction(KVCacheFactory):
    """The common part of the factories of evicting caches.

    Args:
        budget: tokens that each history holds.
    """

    per_head = False
    replicated = True

    def __init__(self, budget: int):
        if budget < 1:
            raise ValueError(f"cache.budget={budget} is a number of tokens; use 1 or more")
        self.budget = budget

    def least_bytes(self, tokens: int, numbers: int, itemsize: int) -> int:
        """See KVCacheFactory."""
        return super().least_bytes(min(tokens, self.budget), numbers, itemsize)

    def misfits(self, model: nn.Module) -> list[str]:
        """See KVCacheFactory."""
        name = type(self).__name__
        attentions = cached_attentions(model)
        if not attentions:
            return [
                f"cache={name.lower()} evicts keys and values, and no layer of this model holds"
                " any: recurrent layers keep a state of constant size; use cache=contiguous"
            ]
        if not self.per_head:
            return []
        sentences = []
        for path, softmax in attentions.items():
            reason = not_by_head(softmax)
            if reason is not None:
                sentences.append(
                    f"cache={name.lower()} chooses tokens for each key head, but {path} {reason};"
                    " use cache=tova, which chooses for all heads together"
                )
        return sentences


class EvictingCache(KVCache):
    """Tensors [N, S, ...] in the order of the text, of which `keep` drops what is not wanted.

    Attributes:
        groups: histories of a row, N / B.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.groups = 1
        self.tensors: list[Tensor] = []
        self.addresses: Span | None = None
        self.evicted = 0

    def append(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        if self.per_head:
            groups = payload[0].shape[2]
            payload = [rows_of_heads(tensor) for tensor in payload]
            span = span.map(lambda tensor: tensor.repeat_interleave(groups, 0))
            self.groups = groups
        self.make_room(span)
        if self.addresses is None:
            self.tensors = [tensor.clone() for tensor in payload]
            self.addresses = Span(*span.addresses())
        else:
            both = zip(self.tensors, payload, strict=True)
            self.tensors = [torch.cat([held, came], 1) for held, came in both]
            self.addresses = self.addresses.join(Span(*span.addresses()))
        if not span.valid().all():
            self.keep(self.addresses.valid(), evicts=False)

    def make_room(self, span: Span) -> None:
        """Is called with the addresses [N, T] of tokens that come, before they are added."""

    def read(self) -> tuple[Tensors, Span]:
        """See KVCache."""
        assert self.addresses is not None, "nothing was appended yet"
        return self.tensors, self.addresses

    def keep(self, wanted: Tensor, *, evicts: bool = True) -> None:
        """Drops the slots that are not wanted, [N, S] bool, and closes the gaps.

        Args:
            evicts: whether what is dropped counts as evicted; empty slots do not.
        """
        assert self.addresses is not None
        held = self.addresses.valid()
        wanted = wanted & held
        if wanted.all():
            return
        if evicts:
            self.evicted += int((held & ~wanted).sum())
        most = int(wanted.sum(1).max())
        # A stable sort puts wanted slots first and keeps their order.
        order = (~wanted).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
        filled = wanted.gather(1, order)
        # Zeros in empty slots: padding may hold NaN, and a weight of 0 would not silence it.
        self.tensors = [blanked(taken(tensor, order), filled) for tensor in self.tensors]
        moved = self.addresses.map(lambda tensor: tensor.gather(1, order))
        self.addresses = Span(moved.pos, moved.doc.masked_fill(~filled, PADDING), moved.role)
        self.reordered(order, filled)

    def reordered(self, order: Tensor, filled: Tensor) -> None:
        """Is told that slot i now holds what slot order[:, i] held; [N, S'] int64 and bool."""

    def current(self) -> Tensor:
        """[N, S] bool: tokens of the document that goes on in each history."""
        assert self.addresses is not None
        doc = self.addresses.doc
        return (doc == doc.amax(1, keepdim=True)) & (doc != PADDING)

    def select(self, rows: Tensor) -> None:
        """See KVCache."""
        if self.addresses is None:
            return
        index = self.histories(rows)
        self.tensors = [tensor[index] for tensor in self.tensors]
        self.addresses = self.addresses.map(lambda tensor: tensor[index])

    def histories(self, rows: Tensor) -> Tensor:
        """Returns the numbers of the histories of these rows."""
        line = torch.arange(self.groups, device=rows.device)
        return (rows[:, None] * self.groups + line).flatten()

    def join(self, other: Any) -> None:
        """See KVCache."""
        if self.addresses is None or other.addresses is None:
            return
        slots = max(self.addresses.shape[1], other.addresses.shape[1])
        joined = []
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            joined.append(torch.cat([widened(mine, slots, 0), widened(theirs, slots, 0)]))
        self.tensors = joined
        fields = []
        for number, mine in enumerate(self.addresses.addresses()):
            theirs = other.addresses.addresses()[number]
            # the document number of an empty slot is PADDING
            blank = PADDING if number == 1 else 0
            fields.append(torch.cat([widened(mine, slots, blank), widened(theirs, slots, blank)]))
        self.addresses = Span(*fields)

    def bytes(self) -> int:
        """See KVCache."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def counters(self) -> Mapping[str, int]:
        """See KVCache."""
        return {"evicted": self.evicted}

    def export_state(self) -> tuple[Tensors, Span]:
        """See KVCache.

        Histories of a row may hold different tokens, so their addresses go with the tensors; those
        that are returned beside them are of the first history.
        """
        assert self.addresses is not None, "nothing was appended yet"
        held = [*self.tensors, *self.addresses.addresses(), *self.numbers()]
        by_row = [tensor.unflatten(0, (-1, self.groups)).transpose(1, 2) for tensor in held]
        first = self.addresses.map(lambda tensor: tensor.unflatten(0, (-1, self.groups))[:, 0])
        return by_row, first

    def import_state(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        self.groups = payload[0].shape[2]
        held = [tensor.transpose(1, 2).flatten(0, 1).clone() for tensor in payload]
        numbers = len(self.numbers())
        if numbers:
            self.take_numbers(held[-numbers:])
            held = held[:-numbers]
        *self.tensors, pos, doc, role = held
        self.addresses = Span(pos, doc, role)

    def numbers(self) -> list[Tensor]:
        """Returns what is held of each token beside payload and address, [N, S]."""
        return []

    def take_numbers(self, numbers: Sequence[Tensor]) -> None:
        """Takes over what `numbers` gave."""


class ScoredCache(EvictingCache):
    """An evicting cache that keeps a number for each token.

    Attributes:
        scores: [N, S] at least float32; a token that is dropped takes its score along.
    """

    wants_weights = True

    def __init__(self, budget: int):
        super().__init__(budget)
        self.scores: Tensor | None = None

    def scores_of_slots(self, like: Tensor) -> Tensor:
        """Returns the scores of all slots, 0 of those that came after the last ones."""
        assert self.addresses is not None
        histories, slots = self.addresses.shape
        if self.scores is None:
            return like.new_zeros(histories, slots)
        return widened(self.scores, slots, 0)

    def append(self, payload: Tensors, span: Span) -> None:
        """See KVCache."""
        # Slots may move while tokens are added, so every slot needs its score before.
        if self.scores is not None:
            self.scores = widened(self.scores, self.scores.shape[1] + span.shape[1], 0)
        super().append(payload, span)

    def reordered(self, order: Tensor, filled: Tensor) -> None:
        """See EvictingCache."""
        if self.scores is not None:
            self.scores = self.scores.gather(1, order).masked_fill(~filled, 0)

    def numbers(self) -> list[Tensor]:
        """See EvictingCache."""
        if self.scores is None:
            return [torch.zeros(0)]
        return [self.scores]

    def take_numbers(self, numbers: Sequence[Tensor]) -> None:
        """See EvictingCache."""
        self.scores = numbers[0]

    def select(self, rows: Tensor) -> None:
        """See KVCache."""
        if self.scores is not None:
            self.scores = self.scores[self.histories(rows)]
        super().select(rows)

    def join(self, other: Any) -> None:
        """See KVCache."""
        mine = self.scores
        theirs = other.scores
        super().join(other)
        if mine is not None and theirs is not None:
            slots = max(mine.shape[1], theirs.shape[1])
            self.scores = torch.cat([widened(mine, slots, 0), widened(theirs, slots, 0)])


def newest(among: Tensor, count: int) -> Tensor:
    """[N, S] bool: the last `count` of the slots that are True in each history."""
    from_the_end = among.flip(1).long().cumsum(1).flip(1)
    return among & (from_the_end <= count)


def best(scores: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """[N, S] bool: of the slots in `among`, the [N] `count` with the largest scores.

    Of equal scores the earlier token counts more, on every device alike.
    """
    ranked = scores.masked_fill(~among, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return among & (rank < count[:, None])


def rows_of_heads(tensor: Tensor) -> Tensor:
    """[B, T, G, ...] -> [B G, T, 1, ...]."""
    return tensor.transpose(1, 2).flatten(0, 1)[:, :, None]


def taken(tensor: Tensor, slots: Tensor) -> Tensor:
    """[N, S, ...] at [N, K] -> [N, K, ...]."""
    index = slots.view(*slots.shape, *[1] * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(*slots.shape, *tensor.shape[2:]))


def blanked(tensor: Tensor, filled: Tensor) -> Tensor:
    """[N, S, ...] with zeros in the slots that are not filled, [N, S] bool."""
    return tensor.masked_fill(~filled.view(*filled.shape, *[1] * (tensor.dim() - 2)), 0)


def widened(tensor: Tensor, slots: int, blank: int) -> Tensor:
    """[N, S, ...] -> [N, slots, ...], filled up at the end."""
    more = slots - tensor.shape[1]
    if more <= 0:
        return tensor
    rest = tensor.new_full((tensor.shape[0], more, *tensor.shape[2:]), blank)
    return torch.cat([tensor, rest], 1)


def cached_attentions(model: nn.Module) -> dict[str, Softmax]:
    """Returns the softmaxes that hold the tokens before those at hand, by their places: the names
    that they have where no driver stands between them and their layers."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Softmax) and module.extends:
            found[module.place or path] = module
    return found


def layers_of(score: Score) -> list[Score]:
    """Returns a score and those inside it, outermost first."""
    layers = [score]
    while isinstance(layers[-1], WrappedScore):
        layers.append(layers[-1].inner)
    return layers


def innermost(score: Score) -> Score:
    """Returns the score inside all wrappers."""
    return layers_of(score)[-1]


def not_by_head(softmax: Softmax) -> str | None:
    """States why the key heads of an attention cannot hold different tokens; None: they can."""
    score = softmax.score
    if score.payload_heads != (2, 2):
        return "holds latents or other tensors that all heads share"
    if any(isinstance(part, SharedValueScore) for part in layers_of(score)):
        return "shares each value among several key heads"
    if score.param_heads or score.biased or type(innermost(score)) is not Score:
        return "adds to its logits what differs between heads"
    return None
