"""Gated linear attention: a decay per key channel, computed from the token.

Letters: B rows, T tokens, H heads, D key width, E value width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import Layer
from models.norms import RMSNorm
from models.primitives.scan import Scan
from models.recurrent.linear import head_width
from models.span import Span


class GatedLinear(Layer):
    """S_t = diag(sigmoid(gate)^(1 / 16)) S_{t-1} + k_t v_t, a norm per head, an output gate.

    Args:
        width: of input and output.
        heads: they divide width.
        rank: of the projection to the decays.
        gate_logit_normalizer: divides the log decays, so that a fresh layer remembers some tens of
            tokens.

    Source: Yang et al. 2023 (arXiv:2312.06635). Keys here are as wide as values, there half as
    wide.
    """

    def __init__(
        self, width: int, heads: int, *, rank: int = 16, gate_logit_normalizer: float = 16.0
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: must be 1 or more; 16 is usual")
        if gate_logit_normalizer <= 0:
            raise ValueError(
                f"gate_logit_normalizer={gate_logit_normalizer}: must be above 0; 16 is usual"
            )
        self.head_width = head_width(width, heads)
        self.gate_logit_normalizer = gate_logit_normalizer
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.forget = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, width))
        self.norm = RMSNorm(self.head_width, eps=1e-5)
        self.mix = Scan()

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        # Log decays add up over a document: in bfloat16 their sums would lose the newest ones.
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = F.logsigmoid(self.forget(x).to(wide)) / self.gate_logit_normalizer
        heads = (-1, self.head_width)
        query = self.q(x).unflatten(-1, heads) * self.head_width**-0.5
        key = self.k(x).unflatten(-1, heads)
        value = self.v(x).unflatten(-1, heads)
        output = self.mix((query,), (key, value, decay.unflatten(-1, heads)), span=span)
        return self.out(self.norm(output).flatten(-2) * F.silu(self.gate(x)))
