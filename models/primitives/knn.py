"""Nearest-neighbour attention: a mean over the few stored tokens whose keys match a query best.

Three steps, each of which a driver may do its own way: `search` names the best entries, `bring`
fetches them, and a weighted mean of their values is the output. The store is searched exactly.
Queries and the scale get gradients through the scores of the neighbours; a choice has no gradient,
and neither has the store.

The primitive has no parameters. Letters: B rows, T queries, S entries of a store, H query heads, G
key heads, D key width, E value width, K neighbours, U entries brought.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.carried_state import CarriedState
from models.kernels.knn import NOWHERE, KeyValueStore, NearestKeys, blocks, no_neighbors, search
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.scores import Tensors
from models.span import Span

CHUNK_NUMBERS = 1 << 22  # numbers of keys in memory at once


class KNN(Primitive):
    """Attends to the nearest entries of stores on one device, which holds every entry.

    Args:
        mask: the stored tokens that a query may find; by address, as in attention.
        count: K, neighbours of each query and head.

    Source: Wu et al. 2022 (arXiv:2203.08913). Theirs searches approximately where the store is
    large.
    """

    continues_rows = True
    counts_flops = False  # a search over a store whose size no span tells

    def __init__(self, mask: Mask, count: int):
        super().__init__()
        self.mask = mask
        self.count = count

    def forward(
        self, query: Tensors, stores: Sequence[KeyValueStore], params: Tensors, *, span: Span
    ) -> tuple[Tensor, Tensor]:
        """Returns (means [B, T, H, E], has_neighbor [B, T, H] bool).

        Args:
            query: (q [B, T, H, D],); query head h searches the keys of head h // (H / G).
            stores: disjoint sets of tokens; they get no gradients.
            params: (scale [H],), the factor of the products of queries and keys before the softmax.
        """
        (q,) = query
        (scale,) = params
        if span.past is not None and span.past.continues_rows:
            # A store of the rows before has no past, and needs none.
            stores = [
                store if store.span.past is None else self._extended(store, span.past)
                for store in stores
            ]
        with torch.no_grad():
            if stores and not q.is_meta:
                entry = self.search(q, stores, span).entry
                key, value, index = self.bring(entry, stores, q.device)
            else:
                # Without numbers nothing can be compared: cost estimates need the shapes alone.
                index = entry = no_neighbors(q, self.count).entry
                width = stores[0].value.shape[-1] if stores else q.shape[-1]
                key = q.new_zeros(0, q.shape[-1])
                value = q.new_zeros(0, width)
        return _WeightedMean.apply(q, scale, key, value, index), entry[..., 0] != NOWHERE

    def _extended(self, store: KeyValueStore, past: CarriedState) -> KeyValueStore:
        """Returns the store with what the earlier tokens of its rows left."""
        pair = store.key, store.value
        (key, value), span = past.extend(self.place, pair, store.span, self.mask, shared=True)
        return KeyValueStore(key, value, span)

    def search(self, q: Tensor, stores: Sequence[KeyValueStore], span: Span) -> NearestKeys:
        """Returns the nearest entries of all stores, numbered end to end."""
        return search(q, stores, self.mask, span, no_neighbors(q, self.count), 0)

    def bring(
        self, entry: Tensor, stores: Sequence[KeyValueStore], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fetches each neighbour once.

        Returns:
            (keys [U, D], values [U, E], index [B, T, H, K] into them or NOWHERE).
        """
        wanted, index = distinct(entry)
        key, value = taken(stores, wanted, device)
        return key, value, index


def distinct(entry: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (the distinct entry numbers in order [U], the index of each entry among them).

    The index is NOWHERE where the entry is.
    """
    wanted, index = torch.unique(entry, return_inverse=True)
    if len(wanted) and wanted[0] == NOWHERE:
        # NOWHERE is -1 and sorts first: dropping it turns its index into -1 again.
        return wanted[1:], index - 1
    return wanted, index


def taken(
    stores: Sequence[KeyValueStore], wanted: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns keys [U, D] and values [U, E] of the entries with these numbers, on `device`."""
    key = stores[0].key.new_empty(len(wanted), stores[0].key.shape[-1], device=device)
    value = stores[0].value.new_empty(len(wanted), stores[0].value.shape[-1], device=device)
    first = 0
    for store in stores:
        inside = ((wanted >= first) & (wanted < first + store.entries)).nonzero()[:, 0]
        index = (wanted[inside] - first).to(store.key.device)
        key[inside] = store.key.flatten(0, 2).index_select(0, index).to(device)
        value[inside] = store.value.flatten(0, 2).index_select(0, index).to(device)
        first += store.entries
    return key, value


class _WeightedMean(torch.autograd.Function):
    """Softmax means over the neighbours of each query.

    Neighbours of different queries overlap, so their keys and values are copied out for a block of
    queries at a time, and once more in backward, in place of being saved.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, scale, key, value, index)
        output = q.new_zeros(*q.shape[:3], value.shape[-1])
        for part in _query_blocks(q, key, index):
            weights, _, _, values = _neighbor_weights(q[:, part], scale, key, value, index[:, part])
            output[:, part] = (weights[..., None, :] @ values)[..., 0, :]
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, scale, key, value, index = ctx.saved_tensors
        d_q = torch.zeros_like(q)
        d_scale = torch.zeros_like(scale, dtype=_wide(q))
        for part in _query_blocks(q, key, index):
            weights, products, keys, values = _neighbor_weights(
                q[:, part], scale, key, value, index[:, part]
            )
            d_out = grads[0][:, part].to(values.dtype)
            d_weights = (values @ d_out[..., None])[..., 0]
            d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))
            d_products = (d_logits[..., None, :] @ keys)[..., 0, :]
            d_q[:, part] = d_products * scale.to(keys.dtype)[:, None]
            d_scale += (d_logits * products).sum((0, 1, 3))
        return d_q, d_scale.to(scale.dtype), None, None, None


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _query_blocks(q: Tensor, key: Tensor, index: Tensor) -> Iterator[slice]:
    """Yields blocks of queries that fit in memory; none where no entry was brought."""
    if key.is_meta or not len(key):
        return iter(())
    numbers_per_query = index[:, :1].numel() * q.shape[-1]
    return blocks(q.shape[1], CHUNK_NUMBERS // max(1, numbers_per_query))


def _neighbor_weights(
    q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighs the neighbours of a block of t queries.

    Returns:
        (weights [B, t, H, K], 0 where there is no neighbour; products q k [B, t, H, K]; keys
        [B, t, H, K, D]; values [B, t, H, K, E]).
    """
    missing = index == NOWHERE
    index = index.clamp_min(0)
    keys = key[index].to(_wide(q)).masked_fill(missing[..., None], 0)
    values = value[index].to(_wide(q)).masked_fill(missing[..., None], 0)
    products = (keys @ q.to(keys.dtype)[..., None])[..., 0]
    # A query without neighbours keeps finite logits: a softmax of minus infinities is NaN.
    alone = missing.all(-1, keepdim=True)
    logits = products * scale.to(keys.dtype)[:, None]
    logits = logits.masked_fill(missing & ~alone, -torch.inf)
    return logits.softmax(-1).masked_fill(alone, 0), products, keys, values
