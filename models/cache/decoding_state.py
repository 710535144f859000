"""The carried state of decoding: the tokens at hand continue their rows, and nothing is computed
twice.

Every primitive finds here what lies to the left of the tokens at hand: a softmax the payload of all
earlier tokens, a scan its state, a short convolution its last tokens. A piece of any length may be
given, so the prompt is one long piece (or several) and a step is a piece of one token.

    state = DecodingState(Contiguous())
    logits = model(tokens, state.attach(span))     # a piece of each row, padded on the right
    state.advance()

Rows of uneven length stand side by side; where a row has no token in a piece, its state stays.

Letters: B rows, T tokens at hand, S tokens held, M tokens of a tail.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.cache.attention import (
    attend,
    attend_one,
    joined_heads,
    numbered_heads,
    repeated_rows,
    split_heads,
    weights,
)
from models.cache.base import KVCache, KVCacheFactory
from models.cache.contiguous import ContiguousCache
from models.cache.rows import found_span, packed, selected, taken
from models.cache.slots import SlotTable, stacked
from models.carried_state import REPLICATED, SHARDED, CarriedState
from models.kernels.reference import Partial
from models.masks.algebra import Mask
from models.primitives.softmax import add_sink, attention_spec
from models.scores import Score, Tensors
from models.span import DerivedCache, Span


class DecodingState(CarriedState):
    """The state that tokens of some rows left for the tokens that follow them in the same rows.

    Args:
        factory: makes the caches of attention.

    Attributes:
        caches: by the name of the primitive, and the number of its call in a pass.
        shared: names of caches that all ranks have alike.
        tails: the last tokens of each row, for primitives that read no further back.
        imported: by the name of a cache, what waits for the first call of its primitive.
        joined: weights that models.cache.fused_step joined.
    """

    continues_rows = True

    def __init__(self, factory: KVCacheFactory):
        super().__init__()
        self.factory = factory
        self.caches: dict[str, KVCache] = {}
        self.slots: dict[str, SlotTable] = {}
        self.shared: set[str] = set()
        self.tails: dict[str, tuple[int, Tensor]] = {}
        self._new_tails: dict[str, tuple[int, Tensor]] = {}
        # The first call of a primitive knows the mask.
        self.imported: dict[str, tuple[list[Tensor], Span]] = {}
        self._restored = DerivedCache()
        self._tables = DerivedCache()
        self._calls: dict[str, list[Tensors]] = {}
        self._tail_index: dict[int, Tensor] = {}
        self._hidden = DerivedCache()
        self.joined = DerivedCache()

    def attach(self, span: Span, tokens: Tensor | None = None) -> Span:
        """Returns the addresses of the next piece of each row, with this state in it; `tokens`
        [B, T] are those of the piece, for caches that share equal ones between rows."""
        self.factory.announce(tokens)
        attached = super().attach(span)
        self._tables = DerivedCache()
        self._calls = {}
        self._hidden = DerivedCache()
        self._tail_index = {}
        self._new_tails = {}
        # A pass of its own: what was derived from a cache's slots is not true of later ones.
        return attached.fresh()

    def extend(
        self, place: str, payload: Tensors, span: Span, mask: Mask, *, shared: bool = False
    ) -> tuple[Tensors, Span]:
        """See CarriedState; what is held here is exact, whatever `cache=` says."""
        return self._extended(place, payload, span, mask, None, shared).read()

    def hold(self, softmax: Any, payload: Tensors, kv_span: Span) -> tuple[Tensors, Span]:
        """See CarriedState; what is held lies in a cache that `cache=` chose."""
        if not softmax.extends:
            return payload, kv_span
        return self._held(softmax, payload, kv_span).read()

    def _held(self, softmax: Any, payload: Tensors, kv_span: Span) -> KVCache:
        shared = self.factory.replicated
        return self._extended(softmax.place, payload, kv_span, softmax.mask, self.factory, shared)

    def attend(
        self,
        softmax: Any,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        *,
        span: Span,
        kv_span: Span,
        heads: Tensor | None,
    ) -> Tensor:
        """See CarriedState; the payload is held by a cache that `cache=` chose."""
        cache = self._held(softmax, payload, kv_span) if softmax.extends else None
        if cache is not None and span.shape[1] == 1 and type(softmax.score) is Score:
            total = attend_one(softmax, cache, query[0], span, self._hidden)
            if total is not None:
                return self.merged(total)[0]
        if heads is None:
            heads = numbered_heads(softmax.score, query, span)
        spec = attention_spec(softmax.mask, softmax.score, query, heads)
        if cache is None:
            total = attend(spec, query, payload, params, span=span, kv_span=kv_span)
            total = self.merged_source(total)
            add_sink(softmax.score, params, total)
            return total[0].to(query[0].dtype)
        held, held_span = cache.read()
        dtype = query[0].dtype
        groups = 1
        if cache.per_head:
            groups = held_span.shape[0] // span.shape[0]
            query = split_heads(query, groups)
            span = repeated_rows(span, groups)
            spec = attention_spec(softmax.mask, softmax.score, query, None)
        if cache.wants_weights:
            seen = weights(spec, query, held, params, span=span, kv_span=held_span)
            cache.observe(seen, span)
        total = attend(spec, query, held, params, span=span, kv_span=held_span)
        if cache.per_head:
            total = joined_heads(total[0], groups), joined_heads(total[1], groups)
        total = self.merged(total)
        add_sink(softmax.score, params, total)
        return total[0].to(dtype)

    def merged(self, part: Partial) -> Partial:
        """Joins the attention over the tokens held here with that over tokens held elsewhere."""
        return part

    def merged_source(self, part: Partial) -> Partial:
        """Joins the attention over the source at hand with that over what lies elsewhere of it."""
        return part

    def largest(self, part: Tensor) -> Tensor:
        """Returns the largest, element by element, of what is held here and elsewhere."""
        return part

    def tokens(self, name: str, x: Tensor, length: int) -> tuple[Tensor, Span]:
        """Returns the last `length` tokens before these, [B, M, ...], padding where there are
        fewer; and keeps the last ones of x for the next piece."""
        assert self._row is not None, "attach() comes before the forward pass"
        held = self._tail(name, x, length)
        if length not in self._spans:
            self._spans[length] = self._addresses(length)
        index = self._last(length)
        both = torch.cat([held, x], 1)
        self._new_tails[name] = length, taken(both, index)
        return held, self._spans[length]

    def store(self, name: str, state: Tensor, kind: str = REPLICATED) -> None:
        """See CarriedState."""
        if name in self._left:
            raise ValueError(
                f"{name} runs twice in a pass and carries one state: it cannot continue a row token"
                " by token"
            )
        super().store(name, state, kind)

    @torch.no_grad()
    def advance(self) -> None:
        """Makes what the tokens at hand left the state that the next ones find."""
        assert self._row is not None, "attach() comes before the forward pass"
        for length in {length for length, _ in self._new_tails.values()}:
            both = self._addresses(length).join(self._piece())
            index = self._last(length)
            self.addresses[length] = both.map(lambda tensor, index=index: tensor.gather(1, index))
        self.tails |= self._new_tails
        self.states |= self._left
        self._row = None
        self._calls = {}
        self._tables = DerivedCache()

    def select(self, rows: Tensor) -> None:
        """Keeps these rows, [N] int64, in this order; a row may come several times."""
        for table in set(self.slots.values()):
            table.select(rows)
        for cache in self.caches.values():
            cache.select(rows)
        self.imported = selected(self.imported, rows)
        self.tails = {name: (length, x[rows]) for name, (length, x) in self.tails.items()}
        for length, span in self.addresses.items():
            self.addresses[length] = span.map(lambda tensor: tensor[rows])
        for name, (kind, state) in self.states.items():
            self.states[name] = kind, self._by_row(kind, state, rows)
        self.rows = len(rows)

    def join(self, other: "DecodingState") -> None:
        """Adds the rows of another state of the same model below its own."""
        joined: set[SlotTable] = set()
        for place, table in self.slots.items():
            if table not in joined:
                table.join(other.slots[place])
                joined.add(table)
        for place, cache in self.caches.items():
            cache.join(other.caches[place])
        for name, (length, x) in self.tails.items():
            self.tails[name] = length, torch.cat([x, other.tails[name][1]])
        for length, span in self.addresses.items():
            self.addresses[length] = stacked(span, other.addresses[length])
        for name, (kind, state) in self.states.items():
            self.states[name] = kind, torch.cat([state, other.states[name][1]])
        self.rows += other.rows

    def export_state(self) -> dict[str, Tensor]:
        """Returns all that is held, as it would be on one device, every tensor with the rows
        first."""
        found: dict[str, Tensor] = {}
        numbers: dict[int, int] = {}
        for name, (payload, span) in self._everything().items():
            number = numbers.setdefault(id(span), len(numbers))
            for field, tensor in zip(("pos", "doc", "role"), span.addresses(), strict=True):
                found[f"slots/{number}/{field}"] = tensor
            kind = "shared" if name in self.shared else "cache"
            for index, tensor in enumerate(payload):
                found[f"{kind}/{number}/{index}/{name}"] = tensor
        for length, span in self.addresses.items():
            for field, tensor in zip(("pos", "doc", "role"), span.addresses(), strict=True):
                found[f"tails/{length}/{field}"] = tensor
        for name, (length, x) in self.tails.items():
            found[f"tail/{length}/{name}"] = x
        for name, (kind, state) in self.states.items():
            found[f"{kind}/{name}"] = self._paired(state) if kind == SHARDED else state
        return found

    def import_state(self, found: Mapping[str, Tensor]) -> None:
        """Takes over what `export_state` gave, on any number of ranks."""
        self.caches = {}
        self.slots = {}
        self.shared = set()
        self.tails = {}
        self.addresses = {}
        self.states = {}
        self.imported = {}
        self._restored = DerivedCache()
        self.rows = len(next(iter(found.values()), ()))
        orders: dict[str, tuple[Tensor, Span]] = {}
        for path, x in found.items():
            kind, rest = path.split("/", 1)
            if kind in (REPLICATED, SHARDED):
                self.states[rest] = kind, x.flatten(0, 1) if kind == SHARDED else x
                continue
            number, name = rest.split("/", 1)
            if kind == "tail":
                self.tails[name] = int(number), x
            elif kind == "tails" and name == "pos":
                self.addresses[int(number)] = found_span(found, f"tails/{number}")
            elif kind in ("cache", "shared"):
                key = f"{kind}/{number}"
                if key not in orders:
                    whole = found_span(found, f"slots/{number}")
                    orders[key] = packed(whole if kind == "shared" else self._own(whole))
                order, span = orders[key]
                _, name = name.split("/", 1)
                payload, _ = self.imported.setdefault(name, ([], span))
                payload.append(taken(x, order))
                if kind == "shared":
                    self.shared.add(name)

    def _own(self, span: Span) -> Span:
        """Returns the addresses of tokens that are held here; padding for all others."""
        return span

    def _everything(self) -> dict[str, tuple[Tensors, Span]]:
        """Returns what each cache holds, that of all ranks where there are several."""
        held: dict[str, tuple[Tensors, Span]] = {**self.imported}
        for name, cache in self.caches.items():
            held[name] = cache.export_state()
        return held

    def restore(self, like: "DecodingState") -> None:
        """Makes the caches of what was imported, as another state has them, so that it can join."""
        for name, (_, span) in list(self.imported.items()):
            exact = isinstance(like.caches[name], ContiguousCache)
            place, _, _ = name.rpartition("#")
            mask = like.slots[name].mask
            factory = None if exact else self.factory
            self.caches[name] = self._create(name, place, span, mask, factory)

    def bytes(self) -> int:
        """Returns the bytes that are reserved, without addresses."""
        held = [x for _, x in (*self.tails.values(), *self.states.values())]
        fixed = sum(tensor.numel() * tensor.element_size() for tensor in held)
        return fixed + sum(cache.bytes() for cache in self.caches.values())

    def release(self) -> None:
        """Ends all rows: pages of a pool are free at once, not when the state is collected."""
        for cache in self.caches.values():
            cache.release()

    def fits(self, tokens: int) -> bool:
        """Tells whether every row can take so many more tokens."""
        return all(cache.fits(tokens) for cache in self.caches.values())

    def counters(self) -> dict[str, int]:
        """Returns the sums of what the caches report, such as evicted tokens."""
        sums: dict[str, int] = {}
        for cache in self.caches.values():
            for name, number in cache.counters().items():
                sums[name] = sums.get(name, 0) + number
        return sums

    def _by_row(self, kind: str, state: Tensor, rows: Tensor) -> Tensor:
        """The state of these rows; one that is dealt has all heads of a row side by side."""
        if kind == REPLICATED:
            return state[rows]
        return state.unflatten(0, (self.rows, -1))[rows].flatten(0, 1)

    def _piece(self) -> Span:
        """Returns the addresses of the tokens at hand, those of all ranks in their global order."""
        assert self._row is not None, "attach() comes before the forward pass"
        return self._row.map(lambda addresses: addresses)

    def _tail(self, name: str, x: Tensor, length: int) -> Tensor:
        """[B, M, ...] as it was left; zeros at the beginning."""
        if name not in self.tails:
            return x.new_zeros(x.shape[0], length, *x.shape[2:])
        return self.tails[name][1].to(x.dtype)

    def _last(self, length: int) -> Tensor:
        """Returns the index [B, M] of each row's last tokens among (tail, tokens at hand)."""
        if length not in self._tail_index:
            valid = torch.cat([self._addresses(length).valid(), self._piece().valid()], 1)
            # A stable sort puts what is missing first and keeps the order of the rest.
            order = valid.to(torch.int8).argsort(dim=1, stable=True)
            self._tail_index[length] = order[:, order.shape[1] - length :]
        return self._tail_index[length]

    def _extended(
        self,
        place: str,
        payload: Tensors,
        span: Span,
        mask: Mask,
        factory: KVCacheFactory | None,
        shared: bool,
    ) -> KVCache:
        """Returns the cache of this primitive, after it took the tokens at hand."""
        calls = self._calls.setdefault(place, [])
        for number, earlier in enumerate(calls):
            # Several reads of one payload in a pass are one set of tokens.
            if len(earlier) == len(payload) and all(a is b for a, b in zip(earlier, payload)):
                return self.caches[f"{place}#{number}"]
        name = f"{place}#{len(calls)}"
        calls.append(payload)
        if name not in self.caches:
            self.caches[name] = self._create(name, place, span, mask, factory)
            if shared:
                self.shared.add(name)
        self.caches[name].append(payload, span)
        return self.caches[name]

    def _create(
        self, name: str, place: str, span: Span, mask: Mask, factory: KVCacheFactory | None
    ) -> KVCache:
        """Returns a new cache, with what was imported for it."""
        imported = self.imported.pop(name, None)
        if imported is None:
            table = self._table(span, mask)
        else:
            table = self._restored_table(imported[1], mask)
        self.slots[name] = table
        cache = ContiguousCache(table) if factory is None else factory.create(place, mask, table)
        if imported is not None:
            cache.import_state(*imported)
        return cache

    def _restored_table(self, addresses: Span, mask: Mask) -> SlotTable:
        def build() -> SlotTable:
            table = SlotTable(mask)
            table.restore(addresses)
            return table

        return self._restored.get(mask, build, addresses)

    def _table(self, span: Span, mask: Mask) -> SlotTable:
        """Returns the table of all places that are first given these tokens under this mask."""
        return self._tables.get(mask, lambda: SlotTable(mask), span)
