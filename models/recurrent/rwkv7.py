"""RWKV-7: a state that decays per channel and is corrected along a learned direction at a learned rate.

Letters: B rows, T tokens, W width, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, constant
from models.mixing.scan import Scan
from models.recurrent.linear import head_width
from models.recurrent.shift import HeadNorm, LowRank, Shift, ramp
from models.span import Span

SLOWEST = -math.exp(-0.5)  # log decays lie between this and 0
POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}  # of the ramps that say how much each part looks back


class Rwkv7(nn.Module):
    """The time mix: S_t = S_{t-1} (diag(w) - kk (a kk)') + v k', per head, with token shift, bonus and gate.

    Args:
        width: of what comes in and goes out.
        heads: they divide width.
        layer, layers: which layer this is, for the initial weights.
        rank: of the low-rank maps to decay, rate and gate.

    Source: Peng et al. 2025 (arXiv:2503.14456). The state here is transposed (keys in rows). Ours leaves out the mixing of the
    first layer's values into those of later layers; every layer uses its own.
    """

    def __init__(self, width: int, heads: int, layer: int, layers: int, *, rank: int = 32):
        super().__init__()
        self.heads, self.head_width = heads, head_width(width, heads)
        self.depth, self.height = 1 - layer / layers, layer / max(1, layers - 1)
        self.shift, self.look = Shift(), nn.Parameter(torch.empty(len(POWERS), width))
        self.r, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay, self.rate = LowRank(width, rank, nn.Tanh()), LowRank(width, rank)
        self.gate = LowRank(width, rank, nn.Sigmoid(), base=False)
        self.direction, self.strength = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(heads, self.head_width))
        self.norm, self.mix = HeadNorm(heads, width, eps=self.head_width * 1e-5), Scan()

    def initial(self) -> dict[str, Rule]:
        return {
            "look": self._looks,
            "decay.up.bias": self._paces,
            "direction": constant(0.71),
            "strength": constant(1.02),
            "bonus": constant(-0.04),
        }

    def _looks(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return torch.stack([ramp(power * self.depth)(shape[1:], generator) for power in POWERS.values()])

    def _paces(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return -6.5 + 5 * torch.linspace(0, 1, shape[0]) ** (0.85 + self.height**0.5)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        away = self.shift(x, span)
        r, w, k, v, a, g = (x + away * look for look in self.look)
        wide = torch.promote_types(x.dtype, torch.float32)
        decay, rate = SLOWEST * self.decay(w).to(wide).sigmoid(), self.rate(a).sigmoid()
        r, k, v = self.r(r), self.k(k), self.v(v)
        direction, k = k * self.direction, k * (1 + (rate - 1) * self.strength)
        r, k, v, rate, decay, direction = (y.unflatten(-1, (self.heads, -1)) for y in (r, k, v, rate, decay, direction))
        direction = F.normalize(direction.to(wide), dim=-1)
        y = self.mix((r,), (k, v, decay, -direction, direction * rate), at=span)
        now = (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.out((self.norm(y.flatten(-2)) + now.flatten(-2)) * self.gate(g))
