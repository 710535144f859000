"""Recall: a mean over the few stored tokens whose keys match a query best. The store is searched
exactly and learns nothing.

Three steps, each of which a driver may do its own way: `search` names the best entries, `bring`
fetches them, and `mean` weighs their values. Queries and the scale get gradients through the scores
of what was found; a choice has none, nor has the store.

A leaf without parameters. Letters: B rows, T queries, S entries of a store, H query heads, G key
heads, D key width, E value width, K found, U entries brought.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels.knn import NOWHERE, KeyValueStore, Neighbors, blocks, no_neighbors, search
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.scores import Tensors
from models.span import Span

CHUNK_NUMBERS = 1 << 22  # of keys brought together at once


class KNN(Primitive):
    """One device: every entry is at hand.

    Args:
        mask: which stored tokens a query may find; by address, as in attention.
        count: K, entries found for each query and head.

    Source: Wu et al. 2022 (arXiv:2203.08913). Theirs searches approximately where the store is
    large.
    """

    counts_flops = False  # a search over a store whose size no span tells

    def __init__(self, mask: Mask, count: int):
        super().__init__()
        self.mask = mask
        self.count = count

    def forward(
        self, query: Tensors, stores: Sequence[KeyValueStore], params: Tensors, *, span: Span
    ) -> tuple[Tensor, Tensor]:
        """(means [B, T, H, E], found [B, T, H] bool: is there any entry to be found?).

        Args:
            query: (q [B, T, H, D],); query head h searches the keys of head h // (H / G).
            stores: disjoint sets of tokens; they get no gradients.
            params: (scale [H],): what the products of queries and keys are multiplied by before the
                softmax.
        """
        (q,) = query
        (scale,) = params
        with torch.no_grad():
            if (
                stores and not q.is_meta
            ):  # without numbers there is no best: only shapes are asked for
                entry = self.search(q, stores, span).entry
                key, value, index = self.bring(entry, stores, q.device)
            else:
                index = entry = no_neighbors(q, self.count).entry
                key = q.new_zeros(0, q.shape[-1])
                value = q.new_zeros(0, stores[0].value.shape[-1] if stores else q.shape[-1])
        return _WeightedMean.apply(q, scale, key, value, index), entry[..., 0] != NOWHERE

    def search(self, q: Tensor, stores: Sequence[KeyValueStore], span: Span) -> Neighbors:
        """The best of all stores, numbered end to end."""
        return search(q, stores, self.mask, span, no_neighbors(q, self.count), 0)

    def bring(
        self, entry: Tensor, stores: Sequence[KeyValueStore], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(keys [U, D], values [U, E], index [B, T, H, K] into them or NOWHERE): each entry that
        was found, once."""
        wanted, index = distinct(entry)
        return *taken(stores, wanted, device), index


def distinct(entry: Tensor) -> tuple[Tensor, Tensor]:
    """(the numbers of the entries found, each once and in order [U], and which of them each found
    one is, or NOWHERE)."""
    wanted, index = torch.unique(entry, return_inverse=True)
    if len(wanted) and wanted[0] == NOWHERE:
        return wanted[1:], index - 1
    return wanted, index


def taken(
    stores: Sequence[KeyValueStore], wanted: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys [U, D] and values [U, E] of the entries with these numbers, on `device`."""
    key, value = (
        x.new_empty(len(wanted), x.shape[-1], device=device)
        for x in (stores[0].key, stores[0].value)
    )
    first = 0
    for store in stores:
        there = ((wanted >= first) & (wanted < first + store.entries)).nonzero()[:, 0]
        here = (wanted[there] - first).to(store.key.device)
        key[there] = store.key.flatten(0, 2).index_select(0, here).to(device)
        value[there] = store.value.flatten(0, 2).index_select(0, here).to(device)
        first += store.entries
    return key, value


class _WeightedMean(torch.autograd.Function):
    """Softmax means over the entries that each query found; their keys and values stand side by
    side for a block at a time."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, scale, key, value, index)
        out = q.new_zeros(*q.shape[:3], value.shape[-1])
        for part in _parts(q, key, index):
            weights, _, _, values = _weighed(q[:, part], scale, key, value, index[:, part])
            out[:, part] = (weights[..., None, :] @ values)[..., 0, :]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, scale, key, value, index = ctx.saved_tensors
        d_q = torch.zeros_like(q)
        d_scale = torch.zeros_like(scale, dtype=_wide(q))
        for part in _parts(q, key, index):
            weights, products, keys, values = _weighed(
                q[:, part], scale, key, value, index[:, part]
            )
            pull = (values @ grads[0][:, part].to(values.dtype)[..., None])[..., 0]
            d_logits = weights * (pull - (weights * pull).sum(-1, keepdim=True))
            d_q[:, part] = (d_logits[..., None, :] @ keys)[..., 0, :] * scale.to(keys.dtype)[
                :, None
            ]
            d_scale += (d_logits * products).sum((0, 1, 3))
        return d_q, d_scale.to(scale.dtype), None, None, None


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _parts(q: Tensor, key: Tensor, index: Tensor) -> Iterator[slice]:
    """Blocks of queries; none where nothing was found."""
    if key.is_meta or not len(key):
        return iter(())
    return blocks(q.shape[1], CHUNK_NUMBERS // max(1, index[:, :1].numel() * q.shape[-1]))


def _weighed(
    q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor
) -> tuple[Tensor, ...]:
    """(weights [B, t, H, K], 0 where nothing was found; products q k; keys [B, t, H, K, D]; values
    [B, t, H, K, E])."""
    there = index != NOWHERE
    index = index.clamp_min(0)
    keys, values = (x[index].to(_wide(q)).masked_fill(~there[..., None], 0) for x in (key, value))
    products = (keys @ q.to(keys.dtype)[..., None])[..., 0]
    blind = ~there.any(-1, keepdim=True)
    logits = (products * scale.to(keys.dtype)[:, None]).masked_fill(~there & ~blind, -torch.inf)
    return logits.softmax(-1).masked_fill(blind, 0), products, keys, values
