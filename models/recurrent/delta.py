"""The delta rule: a state that is corrected, key by key, toward what it should have answered.

Letters: B rows, T tokens, H heads, D head width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.convolution.short_conv import SiluDepthwiseConv
from models.init import Rule
from models.layer import Layer
from models.primitives.scan import Scan
from models.recurrent.linear import head_width
from models.span import Span


class DeltaNet(Layer):
    """S_t = (1 - b k k') S_{t-1} + b k v, with unit keys and queries, short convolutions, and a
    norm per head.

    Args:
        width: of what comes in and goes out.
        heads: they divide width.
        conv_kernel: of the short convolutions.
        allow_neg_eigval: let b reach 2 and not 1, so that a token can turn the state over (Grazzi
            et al. 2024, arXiv:2411.12537).

    Source: Schlag et al. 2021 (arXiv:2102.11174), Yang et al. 2024 (arXiv:2406.06484).
    """

    def __init__(
        self, width: int, heads: int, *, conv_kernel: int = 4, allow_neg_eigval: bool = False
    ):
        super().__init__()
        self.heads = heads
        self.head_width = head_width(width, heads)
        self.most = 2.0 if allow_neg_eigval else 1.0
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_taps, self.k_taps, self.v_taps = (
            SiluDepthwiseConv(width, conv_kernel) for _ in range(3)
        )
        self.step = nn.Linear(width, heads, bias=False)
        self.norm = nn.RMSNorm(self.head_width, eps=1e-5)
        self.mix = Scan()

    def decay(self, x: Tensor) -> Tensor:
        """[B, T, 1 or H] nats: what is forgotten at every token, at most 0."""
        return x.new_zeros(*x.shape[:2], 1)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.out(self.recall(x, span).flatten(-2))

    def recall(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, H, D]: what the state answers, normed."""
        q, k, v = (
            taps(project(x), span).unflatten(-1, (self.heads, -1))
            for project, taps in (
                (self.q, self.q_taps),
                (self.k, self.k_taps),
                (self.v, self.v_taps),
            )
        )
        wide = torch.promote_types(x.dtype, torch.float32)
        q = F.normalize(q.to(wide), dim=-1) * self.head_width**-0.5
        k = F.normalize(k.to(wide), dim=-1)
        step = (self.most * self.step(x).to(wide).sigmoid())[..., None]
        decay = self.decay(x).to(wide)
        payload = k, step * v.to(wide), decay, k * decay.exp()[..., None], -step * k
        return self.norm(self.mix((q,), payload, span=span).to(x.dtype))


class GatedDeltaNet(DeltaNet):
    """S_t = g_t (1 - b k k') S_{t-1} + b k v: forgets all at a pace that the token sets, then
    corrects; with an output gate.

    Source: Yang et al. 2024 (arXiv:2412.06464); its keys are narrower and its values wider than
    width, here both are as wide.
    """

    def __init__(
        self, width: int, heads: int, *, conv_kernel: int = 4, allow_neg_eigval: bool = False
    ):
        super().__init__(width, heads, conv_kernel=conv_kernel, allow_neg_eigval=allow_neg_eigval)
        self.forget = nn.Linear(width, heads, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.pace = nn.Parameter(torch.empty(heads))
        self.delay = nn.Parameter(torch.empty(heads))

    def init_rules(self) -> dict[str, Rule]:
        return {"pace": paces, "delay": delays}

    def decay(self, x: Tensor) -> Tensor:
        """[B, T, H] nats."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return -self.pace.to(wide).exp() * F.softplus(self.forget(x).to(wide) + self.delay)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.out(self.recall(x, span).flatten(-2) * F.silu(self.gate(x)))


def paces(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Logs of uniform numbers between 1 and 16, as Mamba-2 starts its decays."""
    return (1 + 15 * torch.rand(shape, generator=generator)).log()


def delays(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """What softplus makes time steps of, log-uniform between 0.001 and 0.1, as Mamba starts
    them."""
    step = (math.log(1e-3) + math.log(100) * torch.rand(shape, generator=generator)).exp()
    return step + torch.log(-torch.expm1(-step))
