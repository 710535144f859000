"""The indexer of compressed sparse attention: predicts which summaries a query needs.

It learns from the attention weights themselves. Letters: B rows, T queries, N summaries, K chosen
blocks, H heads, I index heads, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention.compressed_blocks import BlockCompressor, rotate_last
from models.attention.full import CAUSAL
from models.layer import Layer
from models.masks.algebra import visible
from models.positions.base import Position
from models.primitives.block_topk import CHUNK_SCORES, BlockTopK, PickedBlocks
from models.primitives.chosen_divergence import (
    ChosenDivergence,
    ChosenLoss,
    attention_target,
    divergence,
    divergence_of_chosen,
    index_scores,
)
from models.scores import Tensors
from models.span import Span


class Indexer(Layer):
    """Makes the small queries and keys by which summaries are chosen.

    Args:
        width: channels of the layer's input.
        q_latent: channels of the layer's squeezed queries.
        heads: I, index heads.
        channels: C, channels of an index key.
        block, rope_dim, position: as in BlockCompressor.

    Its inputs are detached: the indexer learns from `indexer_loss` alone, and attention learns
    nothing from it.

    Source: DeepSeek-AI 2026, DeepSeek-V4, equations 13 to 17; the loss is that of DeepSeek-V3.2
    (arXiv:2512.02556).
    """

    def __init__(
        self,
        width: int,
        q_latent: int,
        *,
        heads: int,
        channels: int,
        block: int,
        rope_dim: int,
        position: Position,
    ):
        super().__init__()
        self.heads = heads
        self.rope_dim = rope_dim
        self.position = position
        self.compressor = BlockCompressor(width, channels, block, rope_dim, position)
        self.q = nn.Linear(q_latent, heads * channels, bias=False)
        self.weight = nn.Linear(width, heads, bias=False)

    def forward(
        self, hidden: Tensor, latent: Tensor, span: Span, store: BlockTopK, ends: PickedBlocks
    ) -> tuple[Tensors, Tensor]:
        """Projects index queries and keys.

        Args:
            hidden: [B, T, width], the layer's input.
            latent: [B, T, q_latent], its squeezed queries.

        Returns:
            ((queries [B, T, I, C], their weights [B, T, I]), keys [B, N, C]).
        """
        hidden = hidden.detach()
        latent = latent.detach()
        query = self.q(latent).unflatten(-1, (self.heads, -1))
        query = rotate_last(query, span, self.position, self.rope_dim)
        weight = self.weight(hidden) * self.heads**-0.5
        return (query, weight), self.compressor(hidden, span, store, ends)


class _LossInputs(NamedTuple):
    """Tensors of the loss, those with a T axis cut to a chunk of queries where that is computed."""

    index_query: Tensor  # [B, T, I, C]
    index_weight: Tensor  # [B, T, I]
    index_keys: Tensor  # [B, N, C]
    query: Tensor  # [B, T, H, C]
    summaries: Tensor  # [B, N, C]
    summary_share: Tensor  # [B, T, H]

    def chunk(self, part: slice) -> "_LossInputs":
        """The same summaries, and only these queries."""
        return _LossInputs(
            self.index_query[:, part],
            self.index_weight[:, part],
            self.index_keys,
            self.query[:, part],
            self.summaries,
            self.summary_share[:, part],
        )


def indexer_loss(
    query: Tensors,
    keys: Tensor,
    main: tuple[Tensor, Tensor, Tensor],
    chosen: tuple[Tensor, Tensor] | None,
    *,
    span: Span,
    ends: PickedBlocks,
    store: BlockTopK,
    block: int,
) -> Tensor:
    """KL(attention || index) over the summaries of each query, [B, T] in nats.

    Args:
        query, keys: as the indexer gives them; only these get gradients.
        main: (q [B, T, H, C], summaries [B, N, C] times the scale of logits, share [B, T, H] of
            each head's weight that went to summaries).
        chosen: ([B, T, K] numbers of the blocks to compare over, [B, T, K] their index scores), or
            None: all that the query sees.
        ends: the last tokens of all complete blocks.
        store: brings the summaries that a query may see to its rank.
        block: tokens in a block.

    Returns:
        0 where a query has no summary to compare over.

    Summaries of other ranks are brought again in backward; kept are K numbers for each query.
    """
    detached = (tensor.detach() for tensor in main)
    kept: list[ChosenDivergence] = []
    # let go of once they are compared: backward needs what is kept alone
    open_choice = [] if chosen is None else [chosen]
    every = chosen is None
    del chosen

    def loss_of_all_queries(*tensors: Tensor) -> Tensor:
        inputs = _LossInputs(*tensors)
        (index_keys, summaries), summary_span = store.bring(
            (inputs.index_keys, inputs.summaries), CAUSAL, span=span, kv_span=ends.span
        )
        inputs = inputs._replace(index_keys=index_keys, summaries=summaries)
        if every:
            return _loss_in_chunks(inputs, span, summary_span)
        if not kept:  # the second call, in backward, needs no more than the gradient
            share = inputs.query, inputs.summary_share
            spans = {"span": span, "summary_span": summary_span}
            found = divergence_of_chosen(share, summaries, open_choice.pop(), **spans, block=block)
            kept.append(found)
        return ChosenLoss.apply(kept[0], inputs.index_query, inputs.index_weight, index_keys)

    return checkpoint(
        loss_of_all_queries,
        *query,
        keys,
        *detached,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _loss_in_chunks(inputs: _LossInputs, span: Span, summary_span: Span) -> Tensor:
    """`indexer_loss` over all summaries, [B, T], a chunk of queries at a time."""
    rows, _, heads, _ = inputs.query.shape
    step = max(1, CHUNK_SCORES // max(1, rows * heads * inputs.summaries.shape[1]))
    losses = []
    for start in range(0, inputs.query.shape[1], step):
        part = slice(start, start + step)
        chunk_span = span.map(lambda addresses, part=part: addresses[:, part])
        loss = checkpoint(
            _divergence,
            *inputs.chunk(part),
            chunk_span,
            summary_span,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        losses.append(loss)
    return torch.cat(losses, 1)


def _divergence(
    index_query: Tensor,
    index_weight: Tensor,
    index_keys: Tensor,
    query: Tensor,
    summaries: Tensor,
    summary_share: Tensor,
    span: Span,
    summary_span: Span,
) -> Tensor:
    """`indexer_loss` of a few queries over all summaries, [B, T].

    The tensors are separate arguments because `checkpoint` saves the tensors it is given, not those
    inside a tuple.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    inputs = _LossInputs(
        index_query.to(dtype),
        index_weight.to(dtype),
        index_keys.to(dtype),
        query.to(dtype),
        summaries.to(dtype),
        summary_share.to(dtype),
    )
    seen = visible(CAUSAL, span, summary_span)[:, 0]
    index_logits = index_scores((inputs.index_query, inputs.index_weight), (inputs.index_keys,))
    logits = torch.einsum("bthc,bnc->bthn", inputs.query, inputs.summaries)
    target = attention_target(logits, seen, inputs.summary_share)
    return divergence(target, index_logits, seen)[0]
