"""Linear attention: positive features of queries and keys in place of the softmax, so that a state
of fixed size suffices.

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
    """Channels of a head; a ValueError where heads do not divide width."""
    if width % heads:
        raise ValueError(
            f"model.width={width} does not divide among model.heads={heads}; choose a multiple of"
            f" {heads}"
        )
    return width // heads


def weighted_mean(mix: Scan, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """[B, T, H, E]: mean of v [B, T, H, E] with weights q_t k_s, all at least 0 (features [B, T, H,
    M]); 0 where none is."""
    ones = v.new_ones(*v.shape[:-1], 1)
    still = q.new_zeros(*q.shape[:2], 1)
    found = mix((q,), (k, torch.cat([v, ones], -1).to(q.dtype), still), span=span)
    return (found[..., :-1] / found[..., -1:].clamp_min(TINY)).to(v.dtype)


class LinearAttention(Layer):
    """A mean of all values so far, weighted by (elu(q) + 1) (elu(k) + 1).

    Args:
        width: of what comes in and goes out.
        heads: they divide width.

    Source: Katharopoulos et al. 2020 (arXiv:2006.16236). No epsilon in the denominator, which would
    count as a value of 0.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.head_width = head_width(width, heads)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.mix = Scan()

    def features(self, x: Tensor, queries: bool) -> Tensor:
        """[B, T, H, D] -> [B, T, H, M], positive; float32 or float64."""
        return F.elu(x.to(torch.promote_types(x.dtype, torch.float32))) + 1

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v)
        )
        return self.out(
            weighted_mean(
                self.mix, self.features(q, True), self.features(k, False), v, span
            ).flatten(-2)
        )
