"""Summaries of blocks of tokens, and the score that shows a query the summaries it has chosen.

Letters: B rows, T queries, S keys, N summaries, H heads, C channels of a summary, K chosen blocks,
M tokens in a block.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import CAUSAL
from models.init import Rule, constant
from models.kernels.pairs.compressed_pairs import ChosenPairs
from models.layer import Layer
from models.masks.algebra import Mask
from models.masks.basic import SlidingWindow
from models.masks.roles import RoleKey
from models.norms import RMSNorm
from models.positions.base import Position
from models.primitives.block_topk import SUMMARY, BlockTopK, PickedBlocks, find, moved, take
from models.scores import PairBlocks, Score, Tensors, grouped_dot_products
from models.span import Span

EVERY = -2  # stands for all blocks where the number of a chosen block is expected


def summaries_and_window(window: int) -> Mask:
    """Shows the last tokens of a document, the query itself among them, and earlier summaries."""
    return CAUSAL & (RoleKey(SUMMARY) | SlidingWindow(window))


def rotate_last(hidden: Tensor, span: Span, position: Position, rope_dim: int) -> Tensor:
    """Rotates the last `rope_dim` channels of [B, T, H, C]; the others stay as they are."""
    # one split, for the gradients of two slices would be two tensors of all channels to add
    content, turned = hidden.split([hidden.shape[-1] - rope_dim, rope_dim], -1)
    return torch.cat([content, position.rotate(turned, span)], -1)


class BlockCompressor(Layer):
    """Makes one summary of each complete block of a document and the block before it.

    Args:
        width: channels of the input.
        channels: C, channels of a summary.
        block: M, tokens in a block.
        rope_dim: how many of the last channels are rotated, by the position of the block's first
            token.
        position: the rotary position scheme.

    Every token gives two values and two gates per channel: one for its own block and one for the
    next block. A summary is the normed mean of 2 M values, weighted channel by channel with a
    softmax over their gates plus a bias per slot. Blocks are counted from the start of the
    document, so a summary never mixes two documents.

    Source: DeepSeek-AI 2026, DeepSeek-V4, section 2.3.1, equations 9 to 12; as transformers
    computes it.
    """

    def __init__(self, width: int, channels: int, block: int, rope_dim: int, position: Position):
        super().__init__()
        self.channels = channels
        self.block = block
        self.rope_dim = rope_dim
        self.position = position
        self.value = nn.Linear(width, 2 * channels, bias=False)
        self.gate = nn.Linear(width, 2 * channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(block, 2 * channels))
        self.norm = RMSNorm(channels, eps=1e-6)

    def init_rules(self) -> dict[str, Rule]:
        """The bias starts at 0: every slot of a block counts alike."""
        return {"bias": constant(0.0)}

    def forward(self, hidden: Tensor, span: Span, store: BlockTopK, ends: PickedBlocks) -> Tensor:
        """Computes the summaries, [B, T, width] -> [B, N, C].

        Args:
            store: brings the tokens of a block to the rank that owns its last token.
            ends: the last tokens of all complete blocks.
        """
        slots = 2 * self.block
        projected = torch.cat([self.value(hidden), self.gate(hidden)], -1)
        mask = CAUSAL & SlidingWindow(slots)
        (projected,), block_span = store.bring((projected,), mask, span=ends.span, kv_span=span)

        # Slot s of a summary is the token s positions before the block's last one. Slots are looked
        # up by address, because the tokens of a block may lie on several ranks.
        offsets = torch.arange(slots, device=hidden.device)
        slot_span = ends.span.map(lambda addresses: addresses.repeat_interleave(slots, 1))
        slot_span = moved(slot_span, -offsets.repeat(ends.span.shape[1]))
        index, exists = find(slot_span, block_span)
        slot_values = take(projected, index).unflatten(1, (-1, slots))
        values, gates = slot_values.split(2 * self.channels, -1)  # each [B, N, 2 M, 2 C]
        biases = self.bias[(self.block - 1 - offsets) % self.block]

        value = self._own_half(values, offsets)
        gate = self._own_half(gates, offsets) + self._own_half(biases, offsets)
        weight = _masked_softmax(gate, exists.unflatten(1, (-1, slots))[..., None])
        summary = self.norm((weight.to(hidden.dtype) * value).sum(-2))

        block_start = moved(ends.span, 1 - self.block)
        summary = rotate_last(summary[:, :, None], block_start, self.position, self.rope_dim)
        return summary[:, :, 0]

    def _own_half(self, slots: Tensor, offsets: Tensor) -> Tensor:
        """Selects the channels that serve a slot, [..., 2 M, 2 C] -> [..., 2 M, C].

        The first half of a token's channels is for the block after its own, the second half for its
        own block.
        """
        in_previous_block = offsets >= self.block
        first_half = slots[..., : self.channels]
        second_half = slots[..., self.channels :]
        return torch.where(in_previous_block[:, None], first_half, second_half)


def _masked_softmax(gate: Tensor, exists: Tensor) -> Tensor:
    """Softmax over slots, dim -2, in at least float32; 0 at slots that do not exist."""
    dtype = torch.promote_types(gate.dtype, torch.float32)
    # The lowest finite number instead of minus infinity: padding has no slot at all, and a softmax
    # over minus infinities alone would be NaN.
    gate = gate.to(dtype).masked_fill(~exists, torch.finfo(dtype).min)
    return gate.softmax(-2).masked_fill(~exists, 0)


class ChosenScore(Score):
    """Scores keys that are their own values; a query sees only the summaries it has chosen.

    query (q [B, T, H, C], chosen [B, T, K]): numbers of blocks of the query's document, EVERY for
    all, -1 for none. payload (kv [B, S, C], is_summary [B, S, 1]): the second is 1 at summaries and
    0 at tokens. params (sink [H],). The output has C + 1 channels; the last one is the share of the
    weight that went to summaries.
    """

    query_heads = (2, None)
    payload_heads = (None, None)
    param_heads = (0,)
    plain = False

    def __init__(self, block: int, window: int, channels: int, top: int):
        super().__init__(channels**-0.5)
        self.window = window
        self.top = top
        self.block = block

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Score.operands; a key is its value, whose last channel marks summaries.

        The query is 0 there, so that one tensor serves as key and value.
        """
        key = torch.cat([payload[0], payload[1]], -1)[:, :, None]
        return F.pad(query[0], (0, 1)), key, key

    def pairs(
        self,
        mask: Mask,
        query: Tensors,
        payload: Tensors,
        span: Span,
        kv_span: Span,
        *,
        heads: Tensor,
        most: int,
    ) -> Iterator[PairBlocks] | None:
        """See Score.pairs: tokens of the window, and the summaries that each query has chosen."""
        if mask != summaries_and_window(self.window):
            return None
        chosen = query[1].int()
        # In dense steps a query says one number, EVERY; of several numbers none is that.
        if chosen.shape[-1] == 1 and (self.top > 1 or bool((chosen == EVERY).any())):
            return None
        pairs = ChosenPairs(
            span,
            kv_span,
            kv_span.role == SUMMARY,
            heads=query[0].shape[2],
            channels=query[0].shape[3] + 1,
            most=most,
            dtype=query[1].dtype,
        )
        return itertools.chain(pairs.window(self.window), pairs.chosen(chosen, self.block))

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]: scaled products, minus infinity at summaries that were not chosen."""
        logits = grouped_dot_products(query[0], payload[0][:, :, None]) * self.scale(query[0])
        is_summary = kv_span.role == SUMMARY
        if not bool(is_summary.any()):
            return logits
        chosen = chosen_among(query[1].long(), kv_span.pos // self.block)
        seen = chosen | ~is_summary[:, None]
        return torch.where(seen[:, None], logits, -torch.inf)

    def pair_counter(self) -> "ChosenCount":
        """See Score.pair_counter; first steps in which all summaries are seen count like others."""
        return ChosenCount(self.block, self.window, self.top)

    def sink(self, params: Tensors) -> Tensor | None:
        """See Score.sink."""
        return params[0]


@dataclass(frozen=True)
class ChosenCount:
    """Counts the pairs of a query with the tokens of its window and the summaries it chooses."""

    block: int
    window: int
    top: int

    def __call__(self, span: Span) -> int:
        """Over all tokens of the rows; padding counts for nothing."""
        earlier = (span.pos + 1)[span.valid()]
        tokens = earlier.clamp(max=self.window)
        return int((tokens + (earlier // self.block).clamp(max=self.top)).sum())


def chosen_among(chosen: Tensor, block: Tensor) -> Tensor:
    """[B, T, S] bool: True where a key's block [B, S] is among those chosen, [B, T, K]."""
    low = int(block.min())
    high = int(block.max())
    width = high - low + 1
    inside = (chosen >= low) & (chosen <= high)
    # A table over block numbers instead of a [B, T, S, K] comparison. Numbers outside go to one
    # column more, which no key reads.
    table = torch.zeros(*chosen.shape[:2], width + 1, dtype=torch.bool, device=chosen.device)
    table.scatter_(-1, torch.where(inside, chosen - low, width), True)
    table |= (chosen == EVERY).any(-1, keepdim=True)
    column = (block - low)[:, None].expand(-1, chosen.shape[1], -1)
    return table.gather(-1, column)
