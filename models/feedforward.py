"""The gated feed-forward layer. Every feed-forward layer is called with (x, span): some look at
their neighbours."""

from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import Layer
from models.span import Span


class SwiGLU(Layer):
    """down(silu(gate(x)) * up(x)); Shazeer 2020 (arXiv:2002.05202), without biases.

    Args:
        width: of what comes in and goes out.
        ffn: width of what lies between.
    """

    def __init__(self, width: int, ffn: int):
        super().__init__()
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]; the addresses make no difference."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
