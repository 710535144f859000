"""Gated linear attention: every key channel forgets at a pace that the token sets.

Letters: B rows, T tokens, H heads, D key width, E value width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import Layer
from models.primitives.scan import Scan
from models.recurrent.linear import head_width
from models.span import Span


class GatedLinear(Layer):
    """S_t = diag(sigmoid(gate)^(1 / 16)) S_{t-1} + k_t v_t, a norm per head, an output gate.

    Args:
        width: of what comes in and goes out.
        heads: they divide width.
        rank: of the projection to the forgetting gates.
        gate_logit_normalizer: the log of the gates is divided by it, so that a fresh layer
            remembers some tens of tokens.

    Source: Yang et al. 2023 (arXiv:2312.06635). Keys here are as wide as values, there half as
    wide.
    """

    def __init__(
        self, width: int, heads: int, *, rank: int = 16, gate_logit_normalizer: float = 16.0
    ):
        super().__init__()
        if rank < 1 or gate_logit_normalizer <= 0:
            raise ValueError(
                f"rank={rank} must be 1 or more and gate_logit_normalizer={gate_logit_normalizer}"
                " above 0"
            )
        self.head_width = head_width(width, heads)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q, self.k, self.v, self.gate, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(5)
        )
        self.forget = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        self.norm = nn.RMSNorm(self.head_width, eps=1e-5)
        self.mix = Scan()

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = F.logsigmoid(self.forget(x).to(wide)) / self.gate_logit_normalizer
        q, k, v, decay = (
            y.unflatten(-1, (-1, self.head_width)) for y in (self.q(x), self.k(x), self.v(x), decay)
        )
        y = self.mix((q * self.head_width**-0.5,), (k, v, decay), span=span)
        return self.out(self.norm(y).flatten(-2) * F.silu(self.gate(x)))
