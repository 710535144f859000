"""Norms of the residual stream: which kind, which eps, and where in a block they stand."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, constant
from models.layer import Layer

FEW_TOKENS = 16  # a step of decoding; up to here an operation costs its call, not its numbers
WIDE = torch.float32, torch.float64
HOST = "cpu", "meta"  # costs are traced on the second

Kind = Literal["rms", "rms_offset", "layer"]
Place = Literal["before", "both", "after"]


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """The RMS norm of [..., width] without a gain."""
    if _takes_few_operations(x):
        return _RMSNorm.apply(x, None, eps)
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def _takes_few_operations(x: Tensor) -> bool:
    """Returns whether torch's RMS norm of this tensor is a chain of operations."""
    return x.dtype in WIDE and x.device.type in HOST and not torch.compiler.is_compiling()


class RMSNorm(nn.RMSNorm):
    """torch's RMS norm; on a CPU, where that is a chain of operations, in fewer of them.

    Source: Zhang & Sennrich 2019 (arXiv:1910.07467).
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        alike = self.weight is not None and x.dtype == self.weight.dtype
        if not alike or not _takes_few_operations(x):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _RMSNorm.apply(x, self.weight, self.eps)
        few = x.numel() <= FEW_TOKENS * x.shape[-1]
        return few_rms_norm(x, self.weight, self.eps) if few else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    """The RMS norm of a CPU; it keeps its input and one number a token for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
        """[..., width], [width] or None for 1 -> [..., width]."""
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        normed = x * scale
        product = grad * normed
        if weight is None:
            along = product.mean(-1, keepdim=True)
            return torch.addcmul(grad, normed, along, value=-1, out=product).mul_(scale), None, None
        d_weight = product.reshape(-1, x.shape[-1]).sum(0)
        along = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.mul(grad, weight, out=product)  # a third tensor of this size would be the peak
        return d_x.addcmul_(normed, along, value=-1).mul_(scale), d_weight, None


def few_rms_norm(x: Tensor, weight: Tensor, eps: float | None) -> Tensor:
    """The RMS norm of [..., width] in float32 or float64, without a gradient."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(
        _scalar(eps, x.dtype, x.device), length, length, value=1 / x.shape[-1]
    )
    return (x * mean_square.rsqrt_()).mul_(weight)


@lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((1, 1), value, dtype=dtype, device=device)


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
        return rms_norm(parts, self.eps).flatten(-2) * gain


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
            return RMSNorm(width, eps=self.eps)
        if self.kind == "rms_offset":
            return OffsetRMSNorm(width, self.eps)
        return nn.LayerNorm(width, eps=1e-5 if self.eps is None else self.eps)
