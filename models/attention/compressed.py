"""Compressed sparse attention: a window of tokens and a few block summaries chosen by an indexer.

Letters: B rows, T tokens, H heads, C channels of a key, K chosen blocks.
"""

import torch
from torch import Tensor, nn

from models.attention.compressed_blocks import (
    EVERY,
    BlockCompressor,
    ChosenScore,
    rotate_last,
    summaries_and_window,
)
from models.attention.compressed_indexer import Indexer, indexer_loss
from models.attention.full import CAUSAL
from models.init import Rule, ScaledNormal, constant
from models.layer import Layer
from models.norms import RMSNorm, rms_norm
from models.positions.base import Position, require_rotary
from models.positions.rope import Rope
from models.primitives.block_topk import BlockEnds, BlockTopK, PickedBlocks
from models.primitives.chosen_divergence import index_scores
from models.primitives.softmax import Softmax
from models.ranges import Count, Few
from models.span import Span


class Compressed(Layer):
    """Attends to the last `window` tokens, `top` chosen block summaries and a learned sink.

    Args:
        width: channels of input and output.
        heads: query heads, which share one key that is also the value.
        position: must rotate queries and keys without changing their length: rope, interpolated,
            ntk, none.
        channels: C, of a key; null = width / heads.
        rope_dim: how many of the last channels are rotated; null = half of C.
        q_latent: channels that queries are squeezed through; null = width / 2.
        block: tokens in a block.
        top: summaries that a query may choose.
        window: tokens of the window; it counts the query itself.
        index_heads, index_channels: heads and channels of the indexer.
        groups: groups of heads, each with its own projection to `group_width` channels.
        group_width: null = width / groups.
        dense_steps: first steps in which every query sees all summaries while the indexer learns
            from that.

    The indexer's loss is left in `auxiliary["indexer"]` [B, T] (see models/auxiliary.py).
    `on_step_begin` receives the step number; before its first call, attention is sparse.

    Source: DeepSeek-AI 2026, DeepSeek-V4, section 2.3.1, as transformers computes it. Ours counts
    blocks from the start of each document; gives the indexer a loss, which theirs lacks (that of
    V3.2: the target is attention's weights on summaries, summed over heads); rotates pairs
    (i, i + R/2), theirs (2i, 2i + 1): a fixed permutation of channels.
    """

    weight_decay = ("group",)

    def __init__(
        self,
        width: int,
        heads: int,
        position: Position,
        *,
        channels: int | None = None,
        rope_dim: int | None = None,
        q_latent: int | None = None,
        block: int = 4,
        top: Few = 64,
        window: int = 128,
        index_heads: Few = 4,
        index_channels: int = 32,
        groups: int = 1,
        group_width: Count | None = None,
        dense_steps: int = 0,
    ):
        super().__init__()
        channels = max(1, width // heads) if channels is None else channels
        rope_dim = max(2, channels // 4 * 2) if rope_dim is None else rope_dim
        q_latent = max(1, width // 2) if q_latent is None else q_latent
        _validate_channels(position, channels, rope_dim, index_channels)
        _validate_counts(block=block, top=top, q_latent=q_latent, index_heads=index_heads)
        _validate_groups(groups, heads)
        _validate_dense_steps(dense_steps)
        group_width = max(1, width // groups) if group_width is None else group_width

        self.heads = heads
        self.block = block
        self.top = top
        self.rope_dim = rope_dim
        self.groups = groups
        self.position = require_rotary(position, "compressed", heads, rope_dim)
        self.dense_steps = dense_steps
        self.dense = False
        self.auxiliary: dict[str, Tensor] = {}
        self.squeeze_q = nn.Linear(width, q_latent, bias=False)
        self.norm_q = RMSNorm(q_latent, eps=1e-6)
        self.q = nn.Linear(q_latent, heads * channels, bias=False)
        self.kv = nn.Linear(width, channels, bias=False)
        self.norm = RMSNorm(channels, eps=1e-6)
        self.compressor = BlockCompressor(width, channels, block, rope_dim, position)
        self.indexer = Indexer(
            width,
            q_latent,
            heads=index_heads,
            channels=index_channels,
            block=block,
            rope_dim=rope_dim,
            position=position,
        )
        self.sink = nn.Parameter(torch.zeros(heads))
        self.group = nn.Parameter(torch.empty(groups, group_width, heads // groups * channels))
        self.out = nn.Linear(groups * group_width, width, bias=False)
        self.store = BlockTopK()
        score = ChosenScore(block, window, channels, top)
        self.mix = Softmax(summaries_and_window(window), score)

    def runs_by_segment(self) -> str | None:
        """See Layer."""
        return "sums up blocks of a whole document and learns from that"

    def carries_over(self) -> str | None:
        """See Layer."""
        return (
            "compressed attention chooses among summaries from the start of the document, of which"
            " a later row has none"
        )

    def init_rules(self) -> dict[str, Rule]:
        """The sink starts as a key of logit 0."""
        return {"sink": constant(0.0), "group": ScaledNormal()}

    def on_step_begin(self, step: int) -> None:
        """Decides whether this step is dense; step numbers start at 1."""
        self.dense = step <= self.dense_steps

    def forward(self, hidden: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        # a recomputation in backward leaves a loss here that is never collected
        self.auxiliary.clear()
        ends = self.store.pick(span, BlockEnds(self.block))
        latent = self.norm_q(self.squeeze_q(hidden))
        query = self.q(latent).unflatten(-1, (self.heads, -1))
        query = rms_norm(query, 1e-6)
        query = rotate_last(query, span, self.position, self.rope_dim)
        tokens = self.norm(self.kv(hidden))[:, :, None]
        tokens = rotate_last(tokens, span, self.position, self.rope_dim)[:, :, 0]
        summaries = self.compressor(hidden, span, self.store, ends)
        index_query, index_keys = self.indexer(hidden, latent, span, self.store, ends)
        chosen, index_logits = self._choose(index_query, index_keys, span, ends)

        # Everything that travels to other ranks is floating point; float32 holds block numbers up
        # to 2^24 exactly, bfloat16 would not.
        exact = torch.promote_types(hidden.dtype, torch.float32)
        is_summary = torch.cat(
            [torch.zeros_like(tokens[..., :1]), torch.ones_like(summaries[..., :1])], 1
        )
        keys = torch.cat([tokens, summaries], 1)
        output = self.mix(
            (query, chosen.to(exact)),
            (keys, is_summary),
            (self.sink,),
            span=span,
            kv_span=ends.joint,
        )
        mean, summary_share = output.split([output.shape[-1] - 1, 1], -1)

        # Of a row in pieces the first pass too: it keeps the summaries that the loss brings.
        ahead = span.past is not None and span.past.carries_gradient
        if torch.is_grad_enabled() or ahead:
            self.auxiliary["indexer"] = indexer_loss(
                index_query,
                index_keys,
                (query, summaries * query.shape[-1] ** -0.5, summary_share[..., 0]),
                None if self.dense else (chosen, index_logits),
                span=span,
                ends=ends,
                store=self.store,
                block=self.block,
            )
        return self._project_out(mean, span)

    def _project_out(self, mean: Tensor, span: Span) -> Tensor:
        """Undoes the rotation of the values and projects, [B, T, H, C] -> [B, T, width]."""
        # Values were rotated with their keys. Rotating the mean back by the query's position leaves
        # a rotation by the distance alone.
        backward_span = Span(-span.pos, span.doc, span.role)
        mean = rotate_last(mean, backward_span, self.position, self.rope_dim)
        grouped = mean.flatten(-2).unflatten(-1, (self.groups, -1))
        grouped = torch.einsum("btgc,gdc->btgd", grouped, self.group)
        return self.out(grouped.flatten(-2))

    def _choose(
        self, index_query: tuple[Tensor, ...], index_keys: Tensor, span: Span, ends: PickedBlocks
    ) -> tuple[Tensor, Tensor]:
        """Returns ([B, T, K] numbers of the blocks that each query sees, -1 for none; scores)."""
        if self.dense:
            every = torch.full((*span.shape, 1), EVERY, dtype=torch.int32, device=index_keys.device)
            return every, torch.zeros_like(every)
        scores, last_token = self.store.best(
            index_scores,
            index_query,
            (index_keys,),
            CAUSAL,
            span=span,
            kv_span=ends.span,
            count=self.top,
        )
        return last_token.int() // self.block, scores  # -1 for none stays -1


def _validate_channels(
    position: Position, channels: int, rope_dim: int, index_channels: int
) -> None:
    """Raises ValueError if the position cannot rotate part of every key there and back."""
    if not 1 <= rope_dim <= min(channels, index_channels):
        raise ValueError(
            f"rope_dim={rope_dim}: must be 1 or more and at most channels={channels} and"
            f" index_channels={index_channels}; choose a smaller number"
        )
    attention_factor = getattr(position, "attention_factor", 1.0)
    if isinstance(position, Rope) and attention_factor != 1.0:
        raise ValueError(
            f"position.attention_factor={attention_factor}: compressed attention rotates its"
            " output back, which must not change its length; set position.attention_factor=1.0"
        )


def _validate_groups(groups: int, heads: int) -> None:
    """Refuses groups of heads that are not equal."""
    _validate_counts(groups=groups)
    if heads % groups:
        raise ValueError(
            f"groups={groups} does not divide model.heads={heads}; choose a divisor of {heads}"
        )


def _validate_dense_steps(dense_steps: int) -> None:
    """Raises ValueError for a negative number of steps."""
    if dense_steps < 0:
        raise ValueError(f"dense_steps={dense_steps}: a number of steps must be 0 or more")


def _validate_counts(**counts: int) -> None:
    """Raises ValueError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count}: {name} must be 1 or more")
