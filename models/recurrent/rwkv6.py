"""RWKV-6: a decay per channel that the token sets, read before the token's own update, which counts
with a bonus.

Letters: B rows, T tokens, W width, H heads, D head width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, normal
from models.layer import Layer
from models.primitives.scan import Scan
from models.recurrent.linear import head_width
from models.recurrent.rwkv_layers import HeadNorm, LowRank, TokenShift, ramp
from models.span import Span

PARTS = ("w", "k", "v", "r", "g")


class Rwkv6(Layer):
    """The time mix: o_t = r_t (S_{t-1} + bonus k_t v_t), S_t = diag(exp(-exp(w_t))) S_{t-1} + k_t
    v_t.

    Args:
        width: of input and output.
        heads: they divide width.
        layer, layers: which layer this is, for the initial weights.
        rank: of the data-dependent mixes and decays.

    Source: Peng et al. 2024 (arXiv:2404.05892).
    """

    def __init__(self, width: int, heads: int, layer: int, layers: int, *, rank: int = 32):
        super().__init__()
        self.heads = heads
        self.head_width = head_width(width, heads)
        self.depth = 1 - layer / layers
        self.height = layer / max(1, layers - 1)
        self.shift = TokenShift()
        self.look = nn.Parameter(torch.empty(1 + len(PARTS), width))
        self.looks = nn.ModuleList(LowRank(width, rank, nn.Tanh(), base=False) for _ in PARTS)
        self.decay = LowRank(width, rank, nn.Tanh())
        self.k, self.v, self.r, self.g, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.bonus = nn.Parameter(torch.empty(heads, self.head_width))
        self.norm = HeadNorm(heads, width, eps=64e-5)
        self.mix = Scan(before=True)

    def init_rules(self) -> dict[str, Rule]:
        return {"look": ramp(self.depth), "decay.up.bias": self._paces, "bonus": normal(0.3)}

    def _paces(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        return -6 + 5 * torch.linspace(0, 1, shape[0]) ** (0.7 + 1.3 * self.height)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        away = self.shift(x, span)
        hint = x + away * self.look[0]
        mixed = (
            x + away * (look + more(hint))
            for look, more in zip(self.look[1:], self.looks, strict=True)
        )
        w, k, v, r, g = mixed
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = -self.decay(w).to(wide).exp()
        k, v, r, decay = (
            y.unflatten(-1, (self.heads, -1)) for y in (self.k(k), self.v(v), self.r(r), decay)
        )
        now = (r * self.bonus * k).sum(-1, keepdim=True) * v
        y = self.mix((r,), (k, v, decay), span=span) + now
        return self.out(self.norm(y.flatten(-2)) * F.silu(self.g(g)))
