"""The carried state of decoding over ranks: tokens stay where they are, and partial results travel.

The prompt may be read as rows are read in training, sharded by any method and layout; each rank
holds the keys of its own tokens from then on. What follows is given to every rank whole: all
compute the same projections, each attends over the keys that it holds, and the partial results are
joined. A new token is held by one rank, given by its position, so all hold about equally many.

What has a fixed size is the same on every rank: states of scans, the last tokens of convolutions,
the hashes and index keys of searches. So a step has no other exchange than this one:

    bytes that a rank sends = (P - 1) B T H (E + 1) x bytes of a number, for each attention

Letters: B rows, T tokens at hand, S slots, P ranks, H heads, E value width, M tokens of a tail.
"""

from typing import Any

import torch
from torch import Tensor

from models.cache.base import KVCache, KVCacheFactory
from models.cache.decoding_state import DecodingState
from models.cache.rows import taken
from models.carried_state import REPLICATED, SHARDED
from models.kernels.blockwise import merge_partials
from models.kernels.reference import Partial
from models.masks.algebra import Mask
from models.primitives.block_topk import keys
from models.scores import Tensors
from models.span import PADDING, Span, to_device
from parallel.collectives import Communicator

OWNED = 64  # neighbouring tokens that one rank holds


class ShardedDecodingState(DecodingState):
    """DecodingState of rows that the ranks of `communicator` hold together.

    The first piece may be sharded (its span has a sharding); every later one is whole on all ranks.
    The source of a model of two streams is sharded, and no rank ever holds all of it.
    """

    def __init__(self, factory: KVCacheFactory, communicator: Communicator):
        super().__init__(factory)
        self.communicator = communicator
        self._owned: dict[int, tuple[Span, Span]] = {}

    def attach(self, span: Span, tokens: Tensor | None = None) -> Span:
        """See DecodingState."""
        self._owned = {}
        return super().attach(span, tokens)

    def extend(
        self, place: str, payload: Tensors, span: Span, mask: Mask, *, shared: bool = False
    ) -> tuple[Tensors, Span]:
        """See CarriedState; of a sharded piece, its driver brings what lies on other ranks."""
        if span.sharding is None:
            span = span if shared else self._own(span)
            return super().extend(place, payload, span, mask, shared=shared)
        held, held_span = payload, span
        if shared:
            held = [self._end_to_end(tensor, "decode gather") for tensor in payload]
            held_span = self._span_of_all(span)
        super().extend(place, held, held_span, mask, shared=shared)
        return payload, span

    def hold(self, softmax: Any, payload: Tensors, kv_span: Span) -> tuple[Tensors, Span]:
        """See CarriedState."""
        held = super().hold(softmax, payload, kv_span)
        # Of a sharded piece, the driver brings what lies on other ranks.
        return held if kv_span.sharding is None else (payload, kv_span)

    def _held(self, softmax: Any, payload: Tensors, kv_span: Span) -> KVCache:
        if kv_span.sharding is None and not self.factory.replicated:
            kv_span = self._own(kv_span)
        return super()._held(softmax, payload, kv_span)

    def merged(self, part: Partial) -> Partial:
        """Joins the attention over this rank's tokens with that of all others, in rank order."""
        return part if self.factory.replicated else self.merged_source(part)

    def merged_source(self, part: Partial) -> Partial:
        """See DecodingState; a source stays where the encoder left it, whatever the cache."""
        mean, lse = part
        packed = torch.cat([mean, lse[..., None]], -1)
        total = None
        for each in self._from_all(packed, "decode merge"):
            other = each[..., :-1], each[..., -1]
            total = other if total is None else merge_partials(total, other)
        assert total is not None
        # A sink is added in place, and a part alone is a view of what arrived.
        return total[0].contiguous(), total[1].contiguous()

    def summed(self, part: Tensor) -> Tensor:
        """See CarriedState."""
        if self._row is not None and self._row.sharding is not None:
            return part
        parts = self._from_all(part, "decode sum")
        return torch.stack(parts).sum(0)

    def largest(self, part: Tensor) -> Tensor:
        """See DecodingState."""
        return torch.stack(self._from_all(part, "decode largest")).amax(0)

    def tokens(self, name: str, x: Tensor, length: int) -> tuple[Tensor, Span]:
        """See DecodingState; before a sharded piece there is nothing."""
        assert self._row is not None, "attach() comes before the forward pass"
        row = self._row
        if row.sharding is None:
            return super().tokens(name, x, length)
        self._new_tails[name] = length, self._last_tokens(x, length)
        return x[:, :0], row.map(lambda addresses: addresses[:, :0])

    def store(self, name: str, state: Tensor, kind: str = REPLICATED) -> None:
        """See CarriedState; what is dealt out over ranks is made whole on all of them."""
        if kind == SHARDED and self._row is not None and self._row.sharding is not None:
            state = torch.cat(self._all_rows(state, "decode states"))
        super().store(name, state, kind)

    def _piece(self) -> Span:
        assert self._row is not None, "attach() comes before the forward pass"
        sharding = self._row.sharding
        return super()._piece() if sharding is None else sharding.whole

    def _own(self, span: Span) -> Span:
        """Returns the addresses with padding where another rank holds the token; the same object
        for the same addresses, so that layers share slots."""
        if id(span) not in self._owned:
            size = self.communicator.size
            mine = span.pos // OWNED % size == self.communicator.rank
            doc = span.doc.masked_fill(~mine, PADDING)
            # Holding `span` keeps its id from being given to another object.
            self._owned[id(span)] = span, Span(span.pos, doc, span.role)
        return self._owned[id(span)][1]

    def _last_tokens(self, x: Tensor, length: int) -> Tensor:
        """Returns the last `length` tokens of each row, [B, M, ...]; zeros where there are fewer.

        Args:
            x: [B, T, ...] this rank's tokens of a sharded piece.
        """
        assert self._row is not None
        sharding = self._row.sharding
        wanted = self._last(length) - length  # below 0: a token from before the piece
        own = to_device(sharding.index(self.communicator.rank, len(x)), x.device)
        match = wanted[:, :, None] == own[:, None]
        mine = taken(x, match.to(torch.int8).argmax(2))
        here = match.any(2).view(*wanted.shape, *[1] * (x.dim() - 2))
        parts = self._from_all(torch.where(here, mine, 0), "decode tails")
        # Each token lies on one rank; the others add zeros.
        return torch.stack(parts).sum(0)

    def _from_all(self, x: Tensor, name: str) -> list[Tensor]:
        """Returns what every rank has, all of the same shape."""
        size = self.communicator.size
        parts = self.communicator.all_to_all([x] * size, [x.numel()] * size, name)
        return [part.view(x.shape) for part in parts]

    def _all_rows(self, x: Tensor, name: str) -> list[Tensor]:
        """Returns what every rank has, [N, ...] with an N of its own."""
        size = self.communicator.size
        number = torch.tensor([len(x)], device=x.device)
        counts = [int(part) for part in self._from_all(number, name)]
        each = x.shape[1:].numel()
        sizes = [count * each for count in counts]
        parts = self.communicator.all_to_all([x] * size, sizes, name)
        return [part.view(-1, *x.shape[1:]) for part in parts]

    def _end_to_end(self, x: Tensor, name: str) -> Tensor:
        """[B, S, ...] of this rank -> [B, S', ...] of all ranks, which differ in S."""
        parts = self._all_rows(x.transpose(0, 1), name)
        return torch.cat(parts).transpose(0, 1)

    def _span_of_all(self, span: Span) -> Span:
        """Returns the addresses of all ranks' tokens, rank by rank; the same object when asked
        again."""

        def build() -> Span:
            name = "decode gather"
            fields = [self._end_to_end(tensor, name) for tensor in span.addresses()]
            return Span(fields[0], fields[1], fields[2])

        return span.cache.get("of all ranks", build)

    def _everything(self) -> dict[str, tuple[Tensors, Span]]:
        """See DecodingState; what lies on all ranks, in the order of its addresses."""
        whole: dict[str, tuple[Tensors, Span]] = {}
        ordered: dict[int, tuple[Tensor, Span]] = {}
        for name, (payload, span) in super()._everything().items():
            if name in self.shared:
                whole[name] = payload, span
                continue
            if id(span) not in ordered:
                everywhere = self._span_of_all(span)
                index = keys(everywhere).argsort(dim=1, stable=True)
                ordered[id(span)] = index, everywhere.map(lambda t, index=index: t.gather(1, index))
            index, ordered_span = ordered[id(span)]
            tensors = [self._end_to_end(tensor, "decode gather") for tensor in payload]
            whole[name] = [taken(tensor, index) for tensor in tensors], ordered_span
        return whole
