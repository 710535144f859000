"""Retention: linear attention whose memory fades at a fixed rate per head, with rotary positions.

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
from models.span import Span


def fading(heads: int) -> list[float]:
    """Log of what each head keeps a token: log(1 - 2^-5), log(1 - 2^-6), ..."""
    return [math.log1p(-(2.0 ** -(5 + head))) for head in range(heads)]


class Retention(Layer):
    """Several heads, each forgetting at its own pace; a norm per head, a gate, and out.

    Args:
        width: of what comes in and goes out.
        heads: they divide width.
        expand: width of the values in units of width.

    Source: Sun et al. 2023, RetNet (arXiv:2307.08621). The scale of the scores and the row norms of
    its code only change what the norm per head takes out again, so they are left out; angles are
    taken in float64, for long documents.
    """

    def __init__(self, width: int, heads: int, *, expand: Few = 2):
        super().__init__()
        self.heads = heads
        self.head_width = head_width(width, heads)
        if self.head_width % 2:
            raise ValueError(
                "retention turns pairs of channels: the head width must be even, got"
                f" {self.head_width}"
            )
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, expand * width, bias=False)
        self.gate = nn.Linear(width, expand * width, bias=False)
        self.norm = nn.RMSNorm(expand * self.head_width, eps=1e-6, elementwise_affine=False)
        self.out = nn.Linear(expand * width, width, bias=False)
        self.mix = Scan()

    def init_rules(self) -> dict[str, Rule]:
        """Xavier with a gain of 2^-2.5 for what goes in, as RetNet has it."""
        rules = {}
        for name in ("q", "k", "v", "gate"):
            shape = getattr(self, name).weight.shape
            rules[f"{name}.weight"] = normal(2**-2.5 * (2 / (shape[0] + shape[1])) ** 0.5)
        return rules

    def turn(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, H, D], pairs (2i, 2i + 1) turned by pos / 10000^(i / (D/2 - 1)): the slowest speed
        is 1e-4 exactly."""
        half = self.head_width // 2
        speeds = 10_000.0 ** -torch.linspace(0, 1, half, dtype=torch.float64, device=x.device)
        angle = span.pos[..., None, None] * speeds
        cos, sin = (
            f.to(torch.promote_types(x.dtype, torch.float32)) for f in (angle.cos(), angle.sin())
        )
        a, b = x.unflatten(-1, (half, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)) for project in (self.q, self.k, self.v)
        )
        fade = torch.tensor(
            fading(self.heads), device=x.device, dtype=torch.promote_types(x.dtype, torch.float32)
        )
        y = self.mix(
            (self.turn(q, span),), (self.turn(k, span), v, fade.expand(*x.shape[:2], -1)), span=span
        )
        return self.out(self.norm(y).flatten(-2) * F.silu(self.gate(x)))
