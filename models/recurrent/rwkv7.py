"""RWKV-7: a state that decays per channel and is corrected along a learned direction at a learned
rate.

Letters: B rows, T tokens, W width, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, constant, orthogonal
from models.layer import Layer
from models.primitives.scan import Scan
from models.ranges import Count, Positive
from models.recurrent.linear import head_width
from models.recurrent.rwkv_layers import HeadNorm, LowRank, TokenShift, ramp
from models.span import Span

SLOWEST = -math.exp(-0.5)  # log decays lie between this and 0
POWERS = {
    "r": 0.2,
    "w": 0.9,
    "k": 0.7,
    "v": 0.7,
    "a": 0.9,
    "g": 0.2,
}  # of the ramps that say how much each part looks back


class Rwkv7(Layer):
    """The time mix: S_t = S_{t-1} (diag(w) - kk (a kk)') + v k', per head, with token shift, bonus
    and gate.

    Args:
        width: of input and output.
        heads: they divide width.
        layer, layers: which layer this is; all but the lowest draw their values toward those of the
            first such layer.
        rank: of the low-rank maps to decay, rate, gate and values.
        decay_rank, rate_rank, gate_rank, value_rank: of one of them; null: rank.
        allow_neg_eigval: let the rate of correction reach 2 and not 1, so that a token can turn the
            state over (Grazzi et al. 2024, arXiv:2411.12537); what is put in stays as it is.
        norm_eps: added to the variance under the norm of heads, in units of the head width.
        direction_eps: added to the squared length of a direction, which is then divided by the
            root; 0: it is divided by its length, as in the paper.

    Source: Peng et al. 2025 (arXiv:2503.14456); initial weights as in its public trainer, but `out`
    starts as in every layer here and not at 0. The state here is transposed (keys in rows). Called
    without a first layer's values it uses its own.
    """

    shares_values = True  # its block hands on the first layer's: models/block.py

    def __init__(
        self,
        width: int,
        heads: int,
        layer: int,
        layers: int,
        *,
        rank: Count = 32,
        decay_rank: Count | None = None,
        rate_rank: Count | None = None,
        gate_rank: Count | None = None,
        value_rank: Count | None = None,
        allow_neg_eigval: bool = False,
        norm_eps: Positive = 1e-5,
        direction_eps: float = 0.0,
    ):
        super().__init__()
        if direction_eps < 0:
            raise ValueError(
                f"direction_eps={direction_eps} is added to a square; use 0 to leave it out"
            )
        self.heads = heads
        self.head_width = head_width(width, heads)
        self.layer = layer
        self.layers = layers
        self.most = 2.0 if allow_neg_eigval else 1.0
        self.shift = TokenShift()
        self.look = nn.Parameter(torch.empty(len(POWERS), width))
        self.r, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.direction_eps = direction_eps
        self.decay = LowRank(width, decay_rank or rank, nn.Tanh())
        self.rate = LowRank(width, rate_rank or rank)
        self.gate = LowRank(width, gate_rank or rank, nn.Sigmoid(), base=False)
        self.pull = LowRank(width, value_rank or rank) if layer else None
        self.direction = nn.Parameter(torch.empty(width))
        self.strength = nn.Parameter(torch.empty(width))
        self.bonus = nn.Parameter(torch.empty(heads, self.head_width))
        self.norm = HeadNorm(heads, width, eps=self.head_width * norm_eps)
        self.mix = Scan()

    def init_rules(self) -> dict[str, Rule]:
        rules = {
            "look": self._looks,
            "r.weight": orthogonal(),
            "k.weight": orthogonal(0.1),
            "v.weight": orthogonal(),
            "decay.up.bias": self._paces,
            "rate.up.bias": lambda shape, _: (
                -0.19 + 0.4 * _rising(shape[0]) + 0.3 * self._comb(shape[0])
            ),
            "direction": lambda shape, _: 0.71 - 0.1 * _rising(shape[0]),
            "strength": constant(1.02),
            "bonus": constant(-0.04),
            "norm.weight": constant(((self.layer + 1) / self.layers) ** 0.7),
        }
        if self.pull is not None:
            rules["pull.up.bias"] = lambda shape, _: 0.73 - 0.4 * _rising(shape[0])
        for name, map in self.named_children():
            if isinstance(map, LowRank):
                rules |= {f"{name}.down.weight": constant(0.0), f"{name}.up.weight": _spread_out}
        return rules

    def _looks(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        depth = 1 - self.layer / self.layers
        return torch.stack([ramp(power * depth)(shape[1:], generator) for power in POWERS.values()])

    def _paces(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        height = self.layer / max(1, self.layers - 1)
        return (
            -5.5
            + 6 * torch.linspace(0, 1, shape[0]) ** (1 + height**0.3)
            + 2.5 * self._comb(shape[0])
        )

    def _comb(self, width: int) -> Tensor:
        """[W] over every head's channels from -1 to 1, flat in the middle."""
        tooth = torch.linspace(-1, 1, self.head_width) if self.head_width > 1 else torch.zeros(1)
        return (tooth * tooth.abs()).repeat(width // self.head_width)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.values(x, span, None)[0]

    def values(self, x: Tensor, span: Span, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the output, and the values [B, T, width] of the first of these layers.

        The latter are `first`, or this layer's own where that is None."""
        away = self.shift(x, span)
        r, w, k, v, a, g = (x + away * look for look in self.look)
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = SLOWEST * self.decay(w).to(wide).sigmoid()
        rate = self.rate(a).sigmoid()
        pull = None if self.pull is None else self.pull(v).sigmoid()
        r = self.r(r)
        k = self.k(k)
        v = self.v(v)
        theirs = v if first is None else first
        if pull is not None:
            v = v + (theirs - v) * pull
        direction = k * self.direction
        k = k * (1 + (rate - 1) * self.strength)
        r, k, v, rate, decay, direction = (
            y.unflatten(-1, (self.heads, -1)) for y in (r, k, v, rate, decay, direction)
        )
        direction = self._unit(direction.to(wide))
        y = self.mix((r,), (k, v, decay, -direction, self.most * direction * rate), span=span)
        now = (r * k * self.bonus).sum(-1, keepdim=True) * v
        return self.out((self.norm(y.flatten(-2)) + now.flatten(-2)) * self.gate(g)), theirs

    def _unit(self, direction: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, T, H, D] of length 1, or a little less."""
        if not self.direction_eps:
            return F.normalize(direction, dim=-1)
        square = direction.square().sum(-1, keepdim=True)
        return direction * (square + self.direction_eps).rsqrt()


def _rising(width: int) -> Tensor:
    """[W] from -1/2 to 1/2."""
    return torch.linspace(-0.5, 0.5, width)


def _spread_out(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Initial value of a low-rank map's last matrix: orthogonal, so that 0.1 is its stretch."""
    return orthogonal(0.1 * max(1.0, shape[1] / shape[0]) ** 0.5)(shape, generator)
