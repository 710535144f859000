"""Recall: a mean over the few stored tokens whose keys match a query best. The store is searched exactly and learns nothing.

Three steps, each of which a driver may do its own way: `search` names the best entries, `bring` fetches them, and `mean` weighs
their values. Queries and the scale get gradients through the scores of what was found; a choice has none, nor has the store.

A leaf without parameters. Letters: B rows, T queries, S entries of a store, H query heads, G key heads, D key width,
E value width, K found, U entries brought.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.masks import Mask, visible
from models.scores import Tensors
from models.span import Span

CHUNK_SCORES = 1 << 22  # scores held at once while searching, and numbers of keys while weighing
CHUNK_QUERIES = 256
NOWHERE = -1


class Store(NamedTuple):
    """Tokens that may be found: keys [B, S, G, D], values [B, S, G, E] and their addresses [B, S]; on any device."""

    key: Tensor
    value: Tensor
    at: Span

    @property
    def entries(self) -> int:
        """B S G: a token counts once for each key head."""
        return self.key.shape[:3].numel()


class Best(NamedTuple):
    """What every query found so far, best first; of equals the one that stands first in the document.

    score [B, T, H, K] float64, minus infinity where fewer are seen; pos [B, T, H, K] int64 in the query's document;
    entry [B, T, H, K] int64, a number that says where it lies, or NOWHERE.
    """

    score: Tensor
    pos: Tensor
    entry: Tensor


class Recall(nn.Module):
    """One device: every entry is at hand.

    Args:
        mask: which stored tokens a query may find; by address, as in attention.
        count: K, entries found for each query and head.

    Source: Wu et al. 2022 (arXiv:2203.08913). Theirs searches approximately where the store is large.
    """

    def __init__(self, mask: Mask, count: int):
        super().__init__()
        self.mask, self.count = mask, count

    def forward(self, query: Tensors, stores: Sequence[Store], params: Tensors, *, at: Span) -> tuple[Tensor, Tensor]:
        """(means [B, T, H, E], found [B, T, H] bool: is there any entry to be found?).

        Args:
            query: (q [B, T, H, D],); query head h searches the keys of head h // (H / G).
            stores: disjoint sets of tokens; they get no gradients.
            params: (scale [H],): what the products of queries and keys are multiplied by before the softmax.
        """
        (q,), (scale,) = query, params
        with torch.no_grad():
            if stores and not q.is_meta:  # without numbers there is no best: only shapes are asked for
                entry = self.search(q, stores, at).entry
                key, value, index = self.bring(entry, stores, q.device)
            else:
                index = entry = blank(q, self.count).entry
                key, value = q.new_zeros(0, q.shape[-1]), q.new_zeros(0, stores[0].value.shape[-1] if stores else q.shape[-1])
        return _Mean.apply(q, scale, key, value, index), entry[..., 0] != NOWHERE

    def search(self, q: Tensor, stores: Sequence[Store], at: Span) -> Best:
        """The best of all stores, numbered end to end."""
        return search(q, stores, self.mask, at, blank(q, self.count), 0)

    def bring(self, entry: Tensor, stores: Sequence[Store], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """(keys [U, D], values [U, E], index [B, T, H, K] into them or NOWHERE): each entry that was found, once."""
        wanted, index = distinct(entry)
        return *taken(stores, wanted, device), index


def blank(q: Tensor, count: int) -> Best:
    """Nothing found yet."""
    score = q.new_full((*q.shape[:3], count), -torch.inf, dtype=torch.float64)
    pos = torch.full_like(score, NOWHERE, dtype=torch.long)
    return Best(score, pos, pos.clone())


def search(q: Tensor, stores: Sequence[Store], mask: Mask, at: Span, best: Best, first: int) -> Best:
    """The best of what was found so far and of the stores, whose entries are numbered from `first` on, end to end.

    Scores are compared in float64 and never held for all queries and entries at once.
    """
    for store in stores:
        for part in _blocks(store.at.shape[1], CHUNK_SCORES // max(1, len(q) * q.shape[2] * min(CHUNK_QUERIES, q.shape[1]))):
            of = store.at.map(lambda t, p=part: t[:, p])
            key = store.key[:, part].to(q.device).double()
            for some in _blocks(q.shape[1], CHUNK_QUERIES):
                seen = visible(mask, at.map(lambda t, s=some: t[:, s]), of)[:, 0]
                if not bool(seen.any()):
                    continue
                held = Best(*(x[:, some] for x in best))
                for whole, fresh in zip(held, _better(q[:, some].double(), key, seen, of, held, (store, part, first))):
                    whole.copy_(fresh)
        first += store.entries
    return best


def _better(q: Tensor, key: Tensor, seen: Tensor, of: Span, held: Best, source: tuple[Store, slice, int]) -> Best:
    """The best of what is held and of one block of a store."""
    store, part, first = source
    heads, groups = q.shape[2], key.shape[2]
    scores = torch.einsum("btgrd,bsgd->btgrs", q.unflatten(2, (groups, -1)), key).flatten(2, 3)
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    where = of.pos[:, None, None].expand_as(scores)
    score, place = _highest(scores, where, held.score.shape[-1])
    pos = where.gather(-1, place)
    row = torch.arange(len(q), device=q.device)[:, None, None, None] * store.at.shape[1]
    group = torch.arange(heads, device=q.device)[:, None] // (heads // groups)
    entry = first + (row + part.start + place) * groups + group
    none = score == -torch.inf
    return merged(held, Best(score, pos.masked_fill(none, NOWHERE), entry.masked_fill(none, NOWHERE)))


def _highest(scores: Tensor, pos: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest along the last dim and where they are; of those equal to the last of them, the lowest `pos`."""
    count = min(count, scores.shape[-1])
    score, place = scores.topk(count)
    least = score[..., -1:]
    tied = scores == least
    if bool(((tied.sum(-1, keepdim=True) > (score == least).sum(-1, keepdim=True)) & (least > -torch.inf)).any()):
        room = (score == least).sum(-1, keepdim=True)
        far = torch.iinfo(pos.dtype).max
        first = torch.where(tied, pos, far).topk(count, largest=False).values.gather(-1, room - 1)
        score, place = scores.masked_fill(tied & (pos > first), -torch.inf).topk(count)
    return score, place


def merged(a: Best, b: Best) -> Best:
    """The best of both, as many as `a` has; their entries differ."""
    count = a.score.shape[-1]
    both = [torch.cat(pair, -1) for pair in zip(a, b)]
    order = both[1].sort(dim=-1, stable=True).indices
    score = both[0].gather(-1, order).sort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, score.indices[..., :count])
    return Best(*(x.gather(-1, order) for x in both))


def distinct(entry: Tensor) -> tuple[Tensor, Tensor]:
    """(the numbers of the entries found, each once and in order [U], and which of them each found one is, or NOWHERE)."""
    wanted, index = torch.unique(entry, return_inverse=True)
    if len(wanted) and wanted[0] == NOWHERE:
        return wanted[1:], index - 1
    return wanted, index


def taken(stores: Sequence[Store], wanted: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Keys [U, D] and values [U, E] of the entries with these numbers, on `device`."""
    key, value = (x.new_empty(len(wanted), x.shape[-1], device=device) for x in (stores[0].key, stores[0].value))
    first = 0
    for store in stores:
        there = ((wanted >= first) & (wanted < first + store.entries)).nonzero()[:, 0]
        here = (wanted[there] - first).to(store.key.device)
        key[there] = store.key.flatten(0, 2).index_select(0, here).to(device)
        value[there] = store.value.flatten(0, 2).index_select(0, here).to(device)
        first += store.entries
    return key, value


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, max(1, size)):
        yield slice(start, min(count, start + max(1, size)))


class _Mean(torch.autograd.Function):
    """Softmax means over the entries that each query found; their keys and values stand side by side for a block at a time."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(q, scale, key, value, index)
        out = q.new_zeros(*q.shape[:3], value.shape[-1])
        for part in _parts(q, key, index):
            weights, _, _, values = _weighed(q[:, part], scale, key, value, index[:, part])
            out[:, part] = (weights[..., None, :] @ values)[..., 0, :]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        q, scale, key, value, index = ctx.saved_tensors
        d_q, d_scale = torch.zeros_like(q), torch.zeros_like(scale, dtype=_wide(q))
        for part in _parts(q, key, index):
            weights, products, keys, values = _weighed(q[:, part], scale, key, value, index[:, part])
            pull = (values @ grads[0][:, part].to(values.dtype)[..., None])[..., 0]
            d_logits = weights * (pull - (weights * pull).sum(-1, keepdim=True))
            d_q[:, part] = (d_logits[..., None, :] @ keys)[..., 0, :] * scale.to(keys.dtype)[:, None]
            d_scale += (d_logits * products).sum((0, 1, 3))
        return d_q, d_scale.to(scale.dtype), None, None, None


def _wide(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _parts(q: Tensor, key: Tensor, index: Tensor) -> Iterator[slice]:
    """Blocks of queries; none where nothing was found."""
    if key.is_meta or not len(key):
        return iter(())
    return _blocks(q.shape[1], CHUNK_SCORES // max(1, index[:, :1].numel() * q.shape[-1]))


def _weighed(q: Tensor, scale: Tensor, key: Tensor, value: Tensor, index: Tensor) -> tuple[Tensor, ...]:
    """(weights [B, t, H, K], 0 where nothing was found; products q k; keys [B, t, H, K, D]; values [B, t, H, K, E])."""
    there, index = index != NOWHERE, index.clamp_min(0)
    keys, values = (x[index].to(_wide(q)) for x in (key, value))
    products = (keys @ q.to(keys.dtype)[..., None])[..., 0].masked_fill(~there, 0)
    blind = ~there.any(-1, keepdim=True)
    logits = (products * scale.to(keys.dtype)[:, None]).masked_fill(~there & ~blind, -torch.inf)
    return logits.softmax(-1).masked_fill(blind, 0), products, keys, values
