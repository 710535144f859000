"""Retention: linear attention with a fixed decay per head and rotary positions.

Letters: B rows, T tokens, H heads, D key width, E value width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, normal
from models.layer import Layer
from models.primitives.scan import Scan
from models.ranges import Few
from models.recurrent.linear import head_width
from models.span import Span, to_device


def fading(heads: int) -> list[float]:
    """Returns the log decay of each head per token: log(1 - 2^-5), log(1 - 2^-6), ..."""
    # log1p, because 1 - 2^-n rounds to 1 for many heads.
    return [math.log1p(-(2.0 ** -(5 + head))) for head in range(heads)]


class Retention(Layer):
    """Retention with several decays, a norm per head, an output gate and a projection.

    Args:
        width: of input and output.
        heads: they divide width.
        expand: width of the values in units of width.

    Source: Sun et al. 2023, RetNet (arXiv:2307.08621). The scale of the scores and the row norms of
    its code are left out, since the norm per head undoes them; angles are computed in float64, for
    long documents.
    """

    def __init__(self, width: int, heads: int, *, expand: Few = 2):
        super().__init__()
        self.heads = heads
        self.head_width = head_width(width, heads)
        if self.head_width % 2:
            raise ValueError(
                f"model.width={width}, model.heads={heads}: retention rotates pairs of channels, so"
                f" the head width must be even, not {self.head_width}; choose another model.heads"
            )
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, expand * width, bias=False)
        self.gate = nn.Linear(width, expand * width, bias=False)
        self.norm = nn.RMSNorm(expand * self.head_width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(expand * width, width, bias=False)
        self.mix = Scan()

    def init_rules(self) -> dict[str, Rule]:
        """Returns Xavier's rule with a gain of 2^-2.5 for the input projections, as in RetNet."""
        rules = {}
        projections = {"q": self.q, "k": self.k, "v": self.v, "gate": self.gate}
        for name, projection in projections.items():
            channels = projection.in_features + projection.out_features
            rules[f"{name}.weight"] = normal(2**-2.5 * (2 / channels) ** 0.5)
        return rules

    def rotate(self, x: Tensor, span: Span) -> Tensor:
        """Rotates pairs (2i, 2i + 1) of [B, T, H, D] by pos / 10000^(i / (D/2 - 1)).

        The slowest frequency is 1e-4 exactly, unlike that of rotary position embeddings.
        """
        half = self.head_width // 2
        wide = torch.promote_types(x.dtype, torch.float32)
        inv_freq = 10_000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64, device=x.device)
        angle = span.pos[..., None, None] * inv_freq
        cos = angle.cos().to(wide)
        sin = angle.sin().to(wide)
        even, odd = x.unflatten(-1, (half, 2)).unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
        return rotated.flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        heads = (self.heads, -1)
        query = self.rotate(self.q(x).unflatten(-1, heads), span)
        key = self.rotate(self.k(x).unflatten(-1, heads), span)
        value = self.v(x).unflatten(-1, heads)
        wide = torch.promote_types(x.dtype, torch.float32)
        decay = to_device(fading(self.heads), x.device, wide)
        decay = decay.expand(*x.shape[:2], -1)
        output = self.mix((query,), (key, value, decay), span=span)
        return self.out(self.norm(output).flatten(-2) * F.silu(self.gate(x)))
