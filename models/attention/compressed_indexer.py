"""The indexer of compressed sparse attention: it guesses which summaries a query needs, and is
taught by attention itself.

Letters: B rows, T queries, N summaries, K chosen, H heads, I index heads, C channels.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention.compressed_blocks import BlockCompressor, rotate_last
from models.attention.full import CAUSAL
from models.masks.algebra import visible
from models.positions.base import Position
from models.primitives.block_topk import CHUNK_SCORES, BlockTopK, PickedBlocks, find, moved, take
from models.scores import Tensors
from models.span import Span


def index_scores(query: Tensors, keys: Tensors) -> Tensor:
    """[B, T, N]: sum over index heads of weight [B, T, I] times the positive part of q [B, T, I, C]
    k [B, N, C] / sqrt(C)."""
    q, weight = query
    (k,) = keys
    return torch.einsum(
        "btin,bti->btn", torch.einsum("btic,bnc->btin", q, k).relu() * k.shape[-1] ** -0.5, weight
    )


class Indexer(nn.Module):
    """Chooses summaries for queries, by small keys of its own.

    Args:
        width, squeezed: of the layer's input, and of its squeezed queries.
        heads, channels: I, and C of its keys.
        block, turned, position: as in Compressor.

    What comes in is detached: the indexer learns from `lesson` alone, and attention learns nothing
    from it.

    Source: DeepSeek-AI 2026, DeepSeek-V4, equations 13 to 17; the loss is that of DeepSeek-V3.2
    (arXiv:2512.02556).
    """

    def __init__(
        self,
        width: int,
        squeezed: int,
        *,
        heads: int,
        channels: int,
        block: int,
        turned: int,
        position: Position,
    ):
        super().__init__()
        self.heads = heads
        self.turned = turned
        self.position = position
        self.compressor = BlockCompressor(width, channels, block, turned, position)
        self.q = nn.Linear(squeezed, heads * channels, bias=False)
        self.weight = nn.Linear(width, heads, bias=False)

    def forward(
        self, x: Tensor, squeezed: Tensor, span: Span, store: BlockTopK, ends: PickedBlocks
    ) -> tuple[Tensors, Tensor]:
        """(queries and their weights ([B, T, I, C], [B, T, I]), keys [B, N, C])."""
        x = x.detach()
        squeezed = squeezed.detach()
        q = self.q(squeezed).unflatten(-1, (self.heads, -1))
        q = rotate_last(q, span, self.position, self.turned)
        return (q, self.weight(x) * self.heads**-0.5), self.compressor(x, span, store, ends)


def indexer_loss(
    query: Tensors,
    keys: Tensor,
    main: tuple[Tensor, Tensor, Tensor],
    chosen: Tensor | None,
    *,
    span: Span,
    ends: PickedBlocks,
    store: BlockTopK,
    block: int,
) -> Tensor:
    """[B, T] nats: how far the softmax of index scores is from where attention went among
    summaries, KL(attention || index).

    Args:
        query, keys: as the indexer gives them; the only ones to get gradients.
        main: (q [B, T, H, C] with its scale, summaries [B, N, C], share [B, T, H] of each head's
            weight that went to them).
        chosen: [B, T, K] numbers of the blocks to compare over, or None: all that the query sees. 0
            where there are none.

    Computed again in backward, a few queries at a time: neither scores nor brought summaries are
    kept.
    """
    q, summaries, share = (t.detach() for t in main)

    def whole(*tensors: Tensor) -> Tensor:
        index_q, index_weight, index_keys, q, summaries, share = tensors
        (index_keys, summaries), inner_span = store.bring(
            (index_keys, summaries), CAUSAL, span=span, kv_span=ends.span
        )
        work = (
            q.shape[0]
            * q.shape[2]
            * (inner_span.shape[1] if chosen is None else chosen.shape[-1] * summaries.shape[-1])
        )
        step = max(1, CHUNK_SCORES // max(1, work))
        parts = []
        for start in range(0, q.shape[1], step):
            part = slice(start, start + step)
            here = span.map(lambda t, p=part: t[:, p])
            some = [t[:, part] for t in (index_q, index_weight, q, share)]
            numbers = None if chosen is None else chosen[:, part]
            again = (
                some[0],
                some[1],
                index_keys,
                some[2],
                summaries,
                some[3],
                numbers,
                here,
                inner_span,
                block,
            )
            parts.append(
                checkpoint(_divergence, *again, use_reentrant=False, preserve_rng_state=False)
            )
        return torch.cat(parts, 1)

    return checkpoint(
        whole, *query, keys, q, summaries, share, use_reentrant=False, preserve_rng_state=False
    )


def _divergence(
    index_q,
    index_weight,
    index_keys,
    q,
    summaries,
    share,
    chosen,
    here: Span,
    span: Span,
    block: int,
) -> Tensor:
    """[B, T] for a few queries."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tensors = (index_q, index_weight, index_keys, q, summaries, share)
    index_q, index_weight, index_keys, q, summaries, share = (t.to(wide) for t in tensors)
    if chosen is None:
        seen = visible(CAUSAL, here, span)[:, 0]
        guess = index_scores((index_q, index_weight), (index_keys,))
        logits = torch.einsum("bthc,bnc->bthn", q, summaries)
    else:  # each query has its own few entries: fold queries into rows
        count = chosen.shape[-1]
        ends = here.map(lambda t: t.repeat_interleave(count, 1))
        number = chosen.flatten(1)
        index, there = find(moved(ends, number * block + block - 1 - ends.pos), span)
        seen = (there & (number >= 0)).unflatten(1, (-1, count))
        own, kept = (
            take(t, index).unflatten(1, (-1, count)).flatten(0, 1) for t in (index_keys, summaries)
        )
        folded = [t.flatten(0, 1)[:, None] for t in (index_q, index_weight, q)]
        guess = index_scores(folded[:2], (own,)).view(seen.shape)
        logits = torch.einsum("bthc,bnc->bthn", folded[2], kept).view(*q.shape[:3], count)
    low = torch.finfo(wide).min
    weight = (
        logits.masked_fill(~seen[:, :, None], low).softmax(-1).masked_fill(~seen[:, :, None], 0)
    )
    target = torch.einsum("bthn,bth->btn", weight, share)
    target = (target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)).detach()
    surprise = target.clamp_min(torch.finfo(wide).tiny).log() - guess.masked_fill(
        ~seen, low
    ).log_softmax(-1)
    return torch.where(seen & (target > 0), target * surprise, 0).sum(-1)
