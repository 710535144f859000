"""Summaries of blocks of tokens, and the score that lets a query see the chosen ones.

Letters: B rows, T queries, S keys, N summaries, H heads, C channels of a summary, M tokens in a
block.
"""

import torch
from torch import Tensor, nn

from models.attention.full import CAUSAL
from models.init import Rule, constant
from models.masks.basic import SlidingWindow
from models.positions.base import Position
from models.primitives.block_topk import SUMMARY, BlockTopK, PickedBlocks, find, moved, take
from models.scores import Score, Tensors, grouped_dot_products
from models.span import Span

EVERY = -2  # in place of the number of a chosen block: all of them


def rotate_last(x: Tensor, span: Span, position: Position, turned: int) -> Tensor:
    """[B, T, H, C]: the last `turned` channels as the position turns them, the others as they
    are."""
    return torch.cat([x[..., :-turned], position.rotate(x[..., -turned:], span)], -1)


class BlockCompressor(nn.Module):
    """One summary for each complete block of a document, made of that block and the one before.

    Args:
        width: of what comes in.
        channels: C, of a summary.
        block: M.
        turned: how many of the last channels the position turns, as of the block's first token.

    Every token gives two values and two gates a channel, for the block it is in and for the block
    that follows. A summary is the mean of 2 M values under a softmax, channel by channel, of their
    gates and a bias for each place, then normed. Blocks are counted from the start of the document,
    so that nothing crosses into another.

    Source: DeepSeek-AI 2026, DeepSeek-V4, section 2.3.1, equations 9 to 12; as transformers
    computes it.
    """

    def __init__(self, width: int, channels: int, block: int, turned: int, position: Position):
        super().__init__()
        self.channels = channels
        self.block = block
        self.turned = turned
        self.position = position
        self.value = nn.Linear(width, 2 * channels, bias=False)
        self.gate = nn.Linear(width, 2 * channels, bias=False)
        self.bias = nn.Parameter(torch.zeros(block, 2 * channels))
        self.norm = nn.RMSNorm(channels, eps=1e-6)

    def initial(self) -> dict[str, Rule]:
        return {"bias": constant(0.0)}

    def forward(self, x: Tensor, span: Span, store: BlockTopK, ends: PickedBlocks) -> Tensor:
        """[B, T, width] -> [B, N, C]; `ends` are the last tokens of the blocks, `store` brings
        those before them."""
        each = self.channels
        block = self.block
        mask = CAUSAL & SlidingWindow(2 * block)
        (every,), among = store.bring(
            (torch.cat([self.value(x), self.gate(x)], -1),), mask, span=ends.span, kv_span=span
        )
        back = torch.arange(2 * block, device=x.device)
        slots = ends.span.map(lambda t: t.repeat_interleave(2 * block, 1))
        index, there = find(moved(slots, -back.repeat(ends.span.shape[1])), among)
        values, gates = (
            take(every, index).unflatten(1, (-1, 2 * block)).split(2 * each, -1)
        )  # [B, N, 2 M, 2 C]
        before = (
            back >= block
        )  # slots of the block before give their first channels, the others their last
        value, gate, bias = (
            torch.where(before[:, None], t[..., :each], t[..., each:])
            for t in (values, gates, self.bias[(block - 1 - back) % block])
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        unseen = ~there.unflatten(1, (-1, 2 * block))[..., None]
        weight = (
            (gate + bias)
            .to(wide)
            .masked_fill(unseen, torch.finfo(wide).min)
            .softmax(-2)
            .masked_fill(unseen, 0)
        )
        summary = self.norm((weight.to(x.dtype) * value).sum(-2))
        start = moved(ends.span, 1 - block)
        return rotate_last(summary[:, :, None], start, self.position, self.turned)[:, :, 0]


class ChosenScore(Score):
    """Keys that are their own values; of summaries only those that a query has chosen are seen.

    query (q [B, T, H, C], chosen [B, T, K]) with the numbers of blocks of the query's document,
    EVERY for all, -1 for none; payload (kv [B, S, C], summary [B, S, 1]), the second 1 at summaries
    and 0 at tokens; params (sink [H],). The last channel of the mean, C + 1 in all, is the share of
    the weight that went to summaries.
    """

    query_heads = (2, None)
    payload_heads = (None, None)
    param_heads = (0,)
    plain = False

    def __init__(self, block: int):
        super().__init__()
        self.block = block

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        key = payload[0][:, :, None]
        return query[0], key, torch.cat([key, payload[1][:, :, None]], -1)

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]."""
        q, k, _ = self.operands(query, payload, params)
        logits = grouped_dot_products(q, k) * self.scale(q)
        summary = kv_span.role == SUMMARY
        if not bool(summary.any()):
            return logits
        seen = chosen_among(query[1].long(), kv_span.pos // self.block) | ~summary[:, None]
        return torch.where(seen[:, None], logits, -torch.inf)

    def sink(self, params: Tensors) -> Tensor | None:
        return params[0]


def chosen_among(chosen: Tensor, block: Tensor) -> Tensor:
    """[B, T, S] bool: is the number of a key's block [B, S] among those chosen [B, T, K]?"""
    low = int(block.min())
    high = int(block.max())
    width = high - low + 1
    inside = (chosen >= low) & (chosen <= high)
    table = torch.zeros(*chosen.shape[:2], width + 1, dtype=torch.bool, device=chosen.device)
    table.scatter_(-1, torch.where(inside, chosen - low, width), True)
    table |= (chosen == EVERY).any(-1, keepdim=True)
    return table.gather(-1, (block - low)[:, None].expand(-1, chosen.shape[1], -1))
