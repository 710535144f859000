"""A learned sink: every head may give part of its attention to no token."""

import torch
from torch import Tensor, nn

from models.attention.full import CAUSAL, Attention
from models.init import Rule, constant
from models.layer import Layer
from models.masks.basic import SlidingWindow
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.scores import SinkScore


class TablesWithSink(Layer):
    """Gives the params of the score: a position's tables, if it has any, then the sink logits."""

    def __init__(self, tables: nn.Module | None, heads: int):
        super().__init__()
        self.inner = tables
        self.logit = nn.Parameter(torch.zeros(heads))

    def init_rules(self) -> dict[str, Rule]:
        """The sink starts as a key of logit 0."""
        return {"logit": constant(0.0)}

    def forward(self) -> tuple[Tensor, ...]:
        """(*tables, sink logits [H])."""
        tables = self.inner() if self.inner is not None else ()
        return *tables, self.logit


class SinkLogit(Attention):
    """Adds a key without a value to every query's keys; its logit is learned, one per head.

    The same as multiplying the output by sigmoid(lse - logit). Logits start at 0: softmax "off by
    one".

    Args:
        window: see only the last `window` tokens; null: all earlier tokens.

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
        self.tables = TablesWithSink(self.tables, heads)
