"""Dense feed-forward layers. Every feed-forward layer is called with (x, span): some look at
their neighbours."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import Layer
from models.span import Span

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
}


class SwiGLU(Layer):
    """down(silu(gate(x)) * up(x)); Shazeer 2020 (arXiv:2002.05202), without biases.

    Args:
        width: of what comes in and goes out.
        ffn: width of what lies between.
        activation: of the gate: silu, gelu, gelu_tanh (its approximation by tanh) or relu.
        bias: of all three matrices.
    """

    def __init__(
        self, width: int, ffn: int, *, activation: Activation = "silu", bias: bool = False
    ):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate = nn.Linear(width, ffn, bias=bias)
        self.up = nn.Linear(width, ffn, bias=bias)
        self.down = nn.Linear(ffn, width, bias=bias)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]; the addresses make no difference."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class FeedForward(Layer):
    """down(activation(up(x))); Vaswani et al. 2017 (arXiv:1706.03762).

    Args:
        width: of what comes in and goes out.
        ffn: width of what lies between.
        activation: silu, gelu, gelu_tanh (its approximation by tanh) or relu.
        bias: of both matrices.
    """

    def __init__(self, width: int, ffn: int, *, activation: Activation = "gelu", bias: bool = True):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, ffn, bias=bias)
        self.down = nn.Linear(ffn, width, bias=bias)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]; the addresses make no difference."""
        return self.down(self.activation(self.up(x)))


class NoFeedForward(Layer):
    """Stands where a layer of a decoder has no feed-forward part, as in Mamba (arXiv:2312.00752).

    Its block is x + mixer(norm(x)) and no more: models/block.py leaves the second norm out.
    """

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """Returns zeros, [B, T, width] -> [B, T, width]."""
        return torch.zeros_like(x)
