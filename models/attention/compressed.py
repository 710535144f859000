"""Compressed sparse attention: a window of tokens, and the few block summaries that an indexer
finds worth a look."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.compressed_blocks import EVERY, BlockCompressor, ChosenScore, rotate_last
from models.attention.compressed_indexer import Indexer, index_scores, indexer_loss
from models.attention.full import CAUSAL
from models.init import Rule, ScaledNormal, constant
from models.masks.basic import SlidingWindow
from models.masks.roles import RoleKey
from models.positions.base import Position, require_rotary
from models.positions.rope import Rope
from models.primitives.block_topk import SUMMARY, BlockEnds, BlockTopK, PickedBlocks
from models.primitives.softmax import Softmax
from models.ranges import Count, Few
from models.span import Span


class Compressed(nn.Module):
    """One softmax over the last `reach` tokens, `top` chosen summaries of complete blocks, and a
    learned sink.

    Args:
        width, heads: of what comes in and goes out; query heads, which share one key that is also
            the value.
        position: must turn queries and keys without changing their length: rope, interpolated, ntk,
            none.
        channels: C, of a key; null = width / heads. turned: the last of them, which the position
            turns; null = half of C.
        q_latent: width that queries are squeezed through; null = width / 2.
        block: tokens in a block. top: summaries that a query may choose. reach: tokens of the
            window, oneself among them.
        index_heads, index_channels: of the indexer.
        groups: of heads, each with its own projection to `group_width` channels; null = width /
            groups.
        dense_steps: steps at the beginning in which every query sees all summaries while the
            indexer learns from that.

    The indexer's loss is left in `auxiliary["indexer"]` [B, T] (see models/auxiliary.py), the step
    is told by `begin`. Before any `begin`, and where no step is told, attention is sparse.

    Source: DeepSeek-AI 2026, DeepSeek-V4, section 2.3.1, as transformers computes it. Ours counts
    blocks from the start of each document; gives the indexer a loss, which theirs lacks (V3.2's:
    attention's weights on summaries, summed over heads, as the target); turns pairs (i, i + R/2),
    theirs (2i, 2i + 1): a fixed permutation of channels.
    """

    decayed = ("group",)

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
        each = max(1, width // heads) if channels is None else channels
        rope_dim = max(2, each // 4 * 2) if rope_dim is None else rope_dim
        squeezed = max(1, width // 2) if q_latent is None else q_latent
        _judge(
            position,
            heads=heads,
            channels=each,
            turned=rope_dim,
            index_channels=index_channels,
            groups=groups,
        )
        counts = {"block": block, "top": top, "query_latent": squeezed, "index_heads": index_heads}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be 1 or more; got {count}")
        if dense_steps < 0:
            raise ValueError(f"dense_steps is a number of steps, 0 or more; got {dense_steps}")
        self.heads = heads
        self.block = block
        self.top = top
        self.rope_dim = rope_dim
        self.groups = groups
        self.position = require_rotary(position, "compressed", heads, rope_dim)
        self.dense_steps = dense_steps
        self.dense = False
        self.auxiliary: dict[str, Tensor] = {}
        self.squeeze_q = nn.Linear(width, squeezed, bias=False)
        self.norm_q = nn.RMSNorm(squeezed, eps=1e-6)
        self.q = nn.Linear(squeezed, heads * each, bias=False)
        self.kv = nn.Linear(width, each, bias=False)
        self.norm = nn.RMSNorm(each, eps=1e-6)
        self.compressor = BlockCompressor(width, each, block, rope_dim, position)
        self.indexer = Indexer(
            width,
            squeezed,
            heads=index_heads,
            channels=index_channels,
            block=block,
            turned=rope_dim,
            position=position,
        )
        inner = max(1, width // groups) if group_width is None else group_width
        self.sink = nn.Parameter(torch.zeros(heads))
        self.group = nn.Parameter(torch.empty(groups, inner, heads // groups * each))
        self.out = nn.Linear(groups * inner, width, bias=False)
        self.store = BlockTopK()
        self.mix = Softmax(CAUSAL & (RoleKey(SUMMARY) | SlidingWindow(window)), ChosenScore(block))

    def initial(self) -> dict[str, Rule]:
        """The sink starts as a key of logit 0."""
        return {"sink": constant(0.0), "group": ScaledNormal()}

    def begin(self, step: int) -> None:
        """Step numbers start at 1."""
        self.dense = step <= self.dense_steps

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        self.auxiliary.clear()  # what a recomputation in backward has left, or nobody has taken
        ends = self.store.pick(span, BlockEnds(self.block))
        squeezed = self.norm_q(self.squeeze_q(x))
        q = self.q(squeezed).unflatten(-1, (self.heads, -1))
        q = rotate_last(F.rms_norm(q, q.shape[-1:], eps=1e-6), span, self.position, self.rope_dim)
        tokens = rotate_last(self.norm(self.kv(x))[:, :, None], span, self.position, self.rope_dim)[
            :, :, 0
        ]
        summaries = self.compressor(x, span, self.store, ends)
        query, keys = self.indexer(x, squeezed, span, self.store, ends)
        chosen = self._choose(query, keys, span, ends)
        kv = torch.cat([tokens, summaries], 1)
        exact = torch.promote_types(x.dtype, torch.float32)  # whole numbers up to 2^24
        marks = torch.cat(
            [torch.zeros_like(tokens[..., :1]), torch.ones_like(summaries[..., :1])], 1
        )
        mean = self.mix(
            (q, chosen.to(exact)), (kv, marks), (self.sink,), span=span, kv_span=ends.joint
        )
        mean, share = mean[..., :-1], mean[..., -1]
        if torch.is_grad_enabled():
            main = q * q.shape[-1] ** -0.5, summaries, share
            over = None if self.dense else chosen
            self.auxiliary["indexer"] = indexer_loss(
                query, keys, main, over, span=span, ends=ends, store=self.store, block=self.block
            )
        back = Span(
            -span.pos, span.doc, span.role
        )  # values were turned with their keys: what is left is the distance
        mean = rotate_last(mean, back, self.position, self.rope_dim)
        grouped = torch.einsum(
            "btgc,gdc->btgd", mean.flatten(-2).unflatten(-1, (self.groups, -1)), self.group
        )
        return self.out(grouped.flatten(-2))

    def _choose(
        self, query: tuple[Tensor, ...], keys: Tensor, span: Span, ends: PickedBlocks
    ) -> Tensor:
        """[B, T, K] numbers of blocks."""
        if self.dense:
            return torch.full((*span.shape, 1), EVERY, device=keys.device)
        _, last = self.store.best(
            index_scores, query, (keys,), CAUSAL, span=span, kv_span=ends.span, count=self.top
        )
        return torch.where(last >= 0, last // self.block, -1)


def _judge(
    position: Position, *, heads: int, channels: int, turned: int, index_channels: int, groups: int
) -> None:
    """Refuse sizes that do not fit each other."""
    if not 1 <= turned <= min(channels, index_channels):
        fact = f"rope_dim={turned} of channels={channels} and index_channels={index_channels}"
        raise ValueError(
            f"{fact}: a position rotates some of the channels of both; choose rope_dim among them"
        )
    if groups < 1 or heads % groups:
        raise ValueError(
            f"model.heads={heads} does not fall into groups={groups}; choose a divisor of {heads}"
        )
    magnitude = getattr(position, "attention_factor", 1.0)
    if isinstance(position, Rope) and magnitude != 1.0:
        raise ValueError(
            f"compressed attention turns its output back, which a position of magnitude {magnitude}"
            " does not allow; set position.attention_factor=1.0"
        )
