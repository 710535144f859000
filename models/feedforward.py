"""The gated feed-forward layer."""

from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)); Shazeer 2020 (arXiv:2002.05202), without biases.

    Args:
        width: of what comes in and goes out.
        hidden: of what lies between.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.down(F.silu(self.gate(x)) * self.up(x))
