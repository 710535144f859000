"""Norms of the residual stream: which kind, which eps, and where in a block they stand."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, constant
from models.layer import Layer

Kind = Literal["rms", "rms_offset", "layer"]
Place = Literal["before", "both", "after"]


class OffsetRMSNorm(Layer):
    """RMS norm whose gain is 1 + weight, so that weight decay or a small start mean a gain of 1.

    Args:
        width: channels of the last dim.
        eps: added to the mean square.

    Source: Gemma (arXiv:2403.08295). The gain is applied before rounding, as there.
    """

    def __init__(self, width: int, eps: float | None = None):
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def init_rules(self) -> dict[str, Rule]:
        """Starts at a gain of 1."""
        return {"weight": constant(0.0)}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        gain = 1 + self.weight.to(wide)
        return F.rms_norm(hidden.to(wide), (self.width,), gain, self.eps).to(hidden.dtype)


class GroupedRMSNorm(Layer):
    """RMS norm of equal parts of the channels, each by itself, with one gain per channel.

    Args:
        width: channels of the last dim.
        groups: parts; they divide width. 1: the norm of all channels.
        eps: added to the mean square.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467), by groups as in Mamba-2 (arXiv:2405.21060).
    """

    def __init__(self, width: int, groups: int, *, eps: float):
        super().__init__()
        if width % groups:
            raise ValueError(f"groups={groups} does not divide {width} channels")
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def init_rules(self) -> dict[str, Rule]:
        """Starts at a gain of 1."""
        return {"weight": constant(1.0)}

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        gain = self.weight.to(hidden.dtype)
        if self.groups == 1:
            return F.rms_norm(hidden, gain.shape, gain, self.eps)
        parts = hidden.unflatten(-1, (self.groups, -1))
        return F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2) * gain


@dataclass(frozen=True)
class NormStyle:
    """The norms of a decoder.

    Attributes:
        kind: rms (Zhang & Sennrich 2019, arXiv:1910.07467), rms_offset (OffsetRMSNorm) or layer
            (Ba et al. 2016, arXiv:1607.06450, with a bias).
        eps: added to the mean square; None: torch's own, the smallest step of the type.
        place: before a mixer and a feed-forward layer (Xiong et al. 2020, arXiv:2002.04745), after
            the sum with their input (Vaswani et al. 2017, arXiv:1706.03762), or both before and
            behind them, inside the residual (Gemma 2, arXiv:2408.00118).
    """

    kind: Kind = "rms"
    eps: float | None = None
    place: Place = "before"

    def make(self, width: int) -> nn.Module:
        """Builds one norm."""
        if self.kind == "rms":
            return nn.RMSNorm(width, eps=self.eps)
        if self.kind == "rms_offset":
            return OffsetRMSNorm(width, self.eps)
        return nn.LayerNorm(width, eps=1e-5 if self.eps is None else self.eps)
