"""A learned sink: every head may give part of its attention to nothing."""

import torch
from torch import Tensor, nn

from models.attention.full import CAUSAL, Attention
from models.init import Rule, constant
from models.masks.basic import SlidingWindow
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SinkScore


class _WithSink(nn.Module):
    """A position's tables, if it has any, and after them the sink logits."""

    def __init__(self, tables: nn.Module | None, heads: int):
        super().__init__()
        self.inner = tables
        self.logit = nn.Parameter(torch.zeros(heads))

    def initial(self) -> dict[str, Rule]:
        return {"logit": constant(0.0)}

    def forward(self) -> tuple[Tensor, ...]:
        return (*(self.inner() if self.inner is not None else ()), self.logit)


class SinkLogit(Attention):
    """A key without a value stands beside every query's keys; its logit is learned, one for each
    head.

    The same as multiplying the output by sigmoid(mass - logit). Logits start at 0: softmax "off by
    one".

    Args:
        window: see only the last `reach` tokens; null: all that came before.

    Source: OpenAI 2025, gpt-oss (arXiv:2508.10925); Miller 2023, "Attention is off by one".
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        *,
        window: int | None = None,
    ):
        mask = CAUSAL if window is None else CAUSAL & SlidingWindow(window)
        super().__init__(width, heads, kv_heads, position, mask=mask)
        self.mix = Softmax(mask, SinkScore(self.mix.score))
        self.tables = _WithSink(self.tables, heads)
