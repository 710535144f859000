"""Linear attention: positive features of queries and keys, which need only a state of fixed size.

Letters: B rows, T tokens, H heads, D key width, E value width, M features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.layer import Layer
from models.primitives.scan import Scan
from models.span import Span

TINY = 1e-30  # below any sum of weights that is not 0; above the smallest float32


def head_width(width: int, heads: int) -> int:
    """Returns the channels of a head; raises ValueError where heads do not divide width."""
    if width % heads:
        raise ValueError(
            f"model.width={width} does not divide among model.heads={heads}; choose a multiple of"
            f" {heads}"
        )
    return width // heads


def weighted_mean(mix: Scan, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Returns the mean of v with weights q_t k_s, [B, T, H, E]; 0 where all weights are 0.

    Args:
        mix: the scan.
        q, k: features [B, T, H, M], at least 0.
        v: [B, T, H, E].
        span: addresses of the tokens.
    """
    # A further value channel of ones carries the sum of the weights.
    ones = v.new_ones(*v.shape[:-1], 1)
    no_decay = q.new_zeros(*q.shape[:2], 1)
    values = torch.cat([v, ones], -1).to(q.dtype)
    sums = mix((q,), (k, values, no_decay), span=span)
    weight_sum = sums[..., -1:].clamp_min(TINY)
    return (sums[..., :-1] / weight_sum).to(v.dtype)


class LinearAttention(Layer):
    """A mean of all values so far, weighted by (elu(q) + 1) (elu(k) + 1).

    Args:
        width: of input and output.
        heads: they divide width.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236). No epsilon in the denominator, which would
    count as a value of 0.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_width = head_width(width, heads)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mix = Scan()

    def features(self, x: Tensor, queries: bool) -> Tensor:
        """Maps [B, T, H, D] to positive features [B, T, H, M]; float32 or float64."""
        return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        heads = (-1, self.head_width)
        query = self.features(self.q(x).unflatten(-1, heads), True)
        key = self.features(self.k(x).unflatten(-1, heads), False)
        value = self.v(x).unflatten(-1, heads)
        mean = weighted_mean(self.mix, query, key, value, span)
        return self.out(mean.flatten(-2))
