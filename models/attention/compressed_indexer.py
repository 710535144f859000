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
from models.primitives.block_topk import CHUNK_SCORES, BlockTopK, PickedBlocks, find, moved, take
from models.scores import Tensors
from models.span import Span


def index_scores(query: Tensors, keys: Tensors) -> Tensor:
    """Scores summaries, [B, T, N]: sum over index heads of weight x relu(q k) / sqrt(C).

    Args:
        query: (q [B, T, I, C], weight [B, T, I]).
        keys: (k [B, N, C],).
    """
    index_query, weight = query
    (index_key,) = keys
    products = torch.einsum("btic,bnc->btin", index_query, index_key)
    products = products.relu() * index_key.shape[-1] ** -0.5
    return torch.einsum("btin,bti->btn", products, weight)


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
    chosen: Tensor | None,
    *,
    span: Span,
    ends: PickedBlocks,
    store: BlockTopK,
    block: int,
) -> Tensor:
    """KL(attention || index) over the summaries of each query, [B, T] in nats.

    Args:
        query, keys: as the indexer gives them; only these get gradients.
        main: (q [B, T, H, C] times its scale, summaries [B, N, C], share [B, T, H] of each head's
            weight that went to summaries).
        chosen: [B, T, K] numbers of the blocks to compare over, or None: all that the query sees.
        ends: the last tokens of all complete blocks.
        store: brings the summaries that a query may see to its rank.
        block: tokens in a block.

    Returns:
        0 where a query has no summary to compare over.

    It is recomputed in backward, a few queries at a time, so neither the scores nor the summaries
    of other ranks are saved.
    """
    detached = (tensor.detach() for tensor in main)

    def loss_of_all_queries(*tensors: Tensor) -> Tensor:
        inputs = _LossInputs(*tensors)
        (index_keys, summaries), summary_span = store.bring(
            (inputs.index_keys, inputs.summaries), CAUSAL, span=span, kv_span=ends.span
        )
        inputs = inputs._replace(index_keys=index_keys, summaries=summaries)
        return _loss_in_chunks(inputs, chosen, span, summary_span, block)

    return checkpoint(
        loss_of_all_queries,
        *query,
        keys,
        *detached,
        use_reentrant=False,
        preserve_rng_state=False,
    )


def _loss_in_chunks(
    inputs: _LossInputs, chosen: Tensor | None, span: Span, summary_span: Span, block: int
) -> Tensor:
    """`indexer_loss` of all queries, [B, T], a chunk of queries at a time."""
    step = _queries_at_once(inputs, chosen)
    losses = []
    for start in range(0, inputs.query.shape[1], step):
        part = slice(start, start + step)
        chunk_span = span.map(lambda addresses, part=part: addresses[:, part])
        chunk_chosen = None if chosen is None else chosen[:, part]
        loss = checkpoint(
            _divergence,
            *inputs.chunk(part),
            chunk_chosen,
            chunk_span,
            summary_span,
            block,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        losses.append(loss)
    return torch.cat(losses, 1)


def _queries_at_once(inputs: _LossInputs, chosen: Tensor | None) -> int:
    """Number of queries in a chunk, so that its scores are at most CHUNK_SCORES numbers."""
    rows, _, heads, _ = inputs.query.shape
    if chosen is None:
        per_head = inputs.summaries.shape[1]
    else:
        # each query has a copy of its own entries, which is larger than their scores
        per_head = chosen.shape[-1] * inputs.summaries.shape[-1]
    work = rows * heads * per_head
    return max(1, CHUNK_SCORES // max(1, work))


def _divergence(
    index_query: Tensor,
    index_weight: Tensor,
    index_keys: Tensor,
    query: Tensor,
    summaries: Tensor,
    summary_share: Tensor,
    chosen: Tensor | None,
    span: Span,
    summary_span: Span,
    block: int,
) -> Tensor:
    """`indexer_loss` of a few queries, [B, T].

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
    if chosen is None:
        seen = visible(CAUSAL, span, summary_span)[:, 0]
        index_logits = index_scores((inputs.index_query, inputs.index_weight), (inputs.index_keys,))
        logits = torch.einsum("bthc,bnc->bthn", inputs.query, inputs.summaries)
    else:
        seen, index_logits, logits = _chosen_logits(inputs, chosen, span, summary_span, block)

    # finite, not minus infinity: a query without a summary would give NaN in the softmax
    lowest = torch.finfo(dtype).min
    smallest = torch.finfo(dtype).tiny
    unseen = ~seen
    weight = logits.masked_fill(unseen[:, :, None], lowest).softmax(-1)
    weight = weight.masked_fill(unseen[:, :, None], 0)
    target = torch.einsum("bthn,bth->btn", weight, inputs.summary_share)
    target = (target / target.sum(-1, keepdim=True).clamp_min(smallest)).detach()
    log_prediction = index_logits.masked_fill(unseen, lowest).log_softmax(-1)
    log_ratio = target.clamp_min(smallest).log() - log_prediction
    return torch.where(seen & (target > 0), target * log_ratio, 0).sum(-1)


def _chosen_logits(
    inputs: _LossInputs, chosen: Tensor, span: Span, summary_span: Span, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over the blocks that each query has chosen.

    Returns:
        (seen [B, T, K] bool, index logits [B, T, K], attention logits [B, T, H, K]).
    """
    count = chosen.shape[-1]
    numbers = chosen.flatten(1)
    query_span = span.map(lambda addresses: addresses.repeat_interleave(count, 1))
    # a summary has the address of the last token of its block
    last_token = moved(query_span, numbers * block + block - 1 - query_span.pos)
    index, exists = find(last_token, summary_span)
    seen = (exists & (numbers >= 0)).unflatten(1, (-1, count))

    # Every query has entries of its own: queries are folded into rows, so that the same einsum
    # serves both forms.
    own_keys = take(inputs.index_keys, index).unflatten(1, (-1, count)).flatten(0, 1)
    own_summaries = take(inputs.summaries, index).unflatten(1, (-1, count)).flatten(0, 1)
    folded_index_query = inputs.index_query.flatten(0, 1)[:, None]
    folded_weight = inputs.index_weight.flatten(0, 1)[:, None]
    folded_query = inputs.query.flatten(0, 1)[:, None]

    index_logits = index_scores((folded_index_query, folded_weight), (own_keys,))
    logits = torch.einsum("bthc,bnc->bthn", folded_query, own_summaries)
    heads_shape = inputs.query.shape[:3]
    return seen, index_logits.view(seen.shape), logits.view(*heads_shape, count)
