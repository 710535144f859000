"""Rotary positions: each position rotates queries and keys, so scores depend on distances alone.

Letters: B rows, T tokens, H heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn

from models.positions.base import Position
from models.ranges import Share
from models.scores import Score
from models.span import Span


class Rope(Position):
    """Rotates pairs of channels (i, i + D/2), as in NeoX and Llama, not (2i, 2i + 1).

    Args:
        theta: the slowest pair takes about 2 pi theta tokens for one turn.
        rotated_share: share of a head's channels that are rotated, the first ones; the others have
            no position (GPT-NeoX, arXiv:2204.06745).

    Source: Su et al. 2021 (arXiv:2104.09864).
    """

    def __init__(self, theta: float = 10_000.0, *, rotated_share: Share = 1.0):
        if theta <= 1:
            raise ValueError(
                f"position.theta is a wavelength in tokens and must be above 1; got {theta}"
            )
        self.theta = theta
        self.rotated_share = rotated_share

    def inv_freq(self, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[width / 2] radians per token, fastest first."""
        if width % 2:
            raise ValueError(
                f"rotary positions turn pairs of channels: the head width must be even, got {width}"
            )
        pair = torch.arange(width // 2, device=device, dtype=dtype) / (width // 2)
        return self.theta**-pair

    def score(self, heads: int, head_width: int) -> tuple[Score, nn.Module | None]:
        """See Position.score.

        Raises:
            ValueError: heads of this width cannot be rotated.
        """
        # called for its checks: a width that does not fit is refused when the layer is built
        self.inv_freq(self.rotated_width(head_width), torch.device("meta"), torch.float32)
        return super().score(heads, head_width)

    def rotated_width(self, head_width: int) -> int:
        """Channels of a head that are rotated."""
        return int(head_width * self.rotated_share)

    def rotate(self, hidden: Tensor, span: Span) -> Tensor:
        """Rotates [B, T, H, D] by each token's position, in at least float32."""
        rotated_width = self.rotated_width(hidden.shape[-1])
        if rotated_width < hidden.shape[-1]:
            rotated = self._rotate(hidden[..., :rotated_width], span)
            return torch.cat([rotated, hidden[..., rotated_width:]], -1)
        return self._rotate(hidden, span)

    def _rotate(self, hidden: Tensor, span: Span) -> Tensor:
        # an angle of 1e5 radians in bfloat16 would be off by whole turns
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        shared = self._shared_turn(hidden.shape[-1], dtype, span)
        if shared is not None:
            cos, sin = shared
            # first * cos - second * sin, then second * cos + first * sin, in three operations
            swapped = hidden.roll(hidden.shape[-1] // 2, -1)
            return torch.addcmul(hidden * cos, swapped, sin).to(hidden.dtype)
        if not torch.compiler.is_compiling():
            inv_freq = self.inv_freq(hidden.shape[-1], span.pos.device, dtype)
            return _Turned.apply(hidden, span.pos, inv_freq)
        angle = self._angle(hidden.shape[-1], dtype, span)
        first, second = hidden.chunk(2, -1)
        cos = angle.cos()
        sin = angle.sin()
        rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
        return rotated.to(hidden.dtype)

    def _angle(self, width: int, dtype: torch.dtype, span: Span) -> Tensor:
        """Radians by which each pair of a token is turned, [B, T, 1, width / 2]."""
        inv_freq = self.inv_freq(width, span.pos.device, dtype)
        return span.pos[..., None, None].to(dtype) * inv_freq

    def _shared_turn(
        self, width: int, dtype: torch.dtype, span: Span
    ) -> tuple[Tensor, Tensor] | None:
        """Returns (cos, cos) and (-sin, sin) of all angles, [B, T, 1, width]; None in training.

        While a model decodes, layers whose settings are equal share them: for a single token they
        cost more than the rotation itself.
        """
        past = span.past
        if past is None or not past.continues_rows or past.carries_gradient:
            return None
        if torch.compiler.is_compiling():
            return None
        key = "rotation", self._settings(), width, dtype

        def build() -> tuple[Tensor, Tensor]:
            angle = self._angle(width, dtype, span)
            cos = angle.cos()
            sin = angle.sin()
            return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)

        return span.cache.get(key, build)

    def _settings(self) -> object:
        """Returns what tells this position from others: class and settings, or else itself."""
        values = vars(self).values()
        if all(isinstance(value, int | float | tuple | None) for value in values):
            return type(self), *values
        return self


class _Turned(torch.autograd.Function):
    """The rotation of every token by its position, whose backward makes the angles again.

    Kept until then, cosines and sines would take 8 bytes a channel and token in every layer.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
        """[B, T, H, D], [B, T], [D / 2] -> [B, T, H, D]."""
        ctx.save_for_backward(pos, inv_freq)
        return _turn(hidden, pos, inv_freq)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        pos, inv_freq = ctx.saved_tensors
        return _turn(grads[0], pos, -inv_freq), None, None


def _turn(hidden: Tensor, pos: Tensor, inv_freq: Tensor) -> Tensor:
    """Turns pairs of channels by pos * inv_freq, in the dtype of inv_freq."""
    angle = pos[..., None, None].to(inv_freq.dtype) * inv_freq
    cos = angle.cos()
    sin = angle.sin()
    wide = hidden.to(inv_freq.dtype)
    first, second = wide.chunk(2, -1)
    # first * cos - second * sin, then second * cos + first * sin: whole heads in three passes
    turned = torch.cat([second, first], -1).mul_(torch.cat([-sin, sin], -1))
    return turned.addcmul_(wide, torch.cat([cos, cos], -1)).to(hidden.dtype)
