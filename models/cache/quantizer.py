"""Quantiser of cached keys and values: groups of numbers share a scale and a minimum.

    scale = (max - min) / (2^bits - 1)    code = round((x - min) / scale)    x' = code scale + min

Letters: B rows, t tokens, n groups of tokens, G numbers of a group, `...` heads and channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TOKENS = "tokens"
CHANNELS = "channels"


class Quantized(NamedTuple):
    """Groups of numbers as codes. Dim 1 counts tokens, or groups of tokens, so it may grow.

    Attributes:
        codes: [B, t or n, ..., G bits / 8] uint8, the first number of a byte in its lowest bits.
        scale, minimum: [B, t or n, ...] in the dtype of the numbers.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    def bytes(self) -> int:
        """Returns the bytes of codes, scales and minima."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self)


class Quantizer:
    """Asymmetric min-max quantiser of tensors [B, t, ..., D].

    Args:
        bits: 2, 4 or 8 of a code.
        along: TOKENS: a group is `group` tokens of one channel (keys in KIVI: some channels are
            large for every token, and such a channel has a scale of its own). CHANNELS: a group is
            `group` channels of one token and head (values in KIVI).
        group: G; None: all D channels of a head, for CHANNELS alone.

    Source: Liu et al. 2024, KIVI (arXiv:2402.02750), section 3. A group of equal numbers has scale
    0 there and divides by it; here its codes are 0 and it returns exactly.
    """

    def __init__(self, bits: int, along: str, group: int | None):
        if bits not in (2, 4, 8):
            raise ValueError(f"{bits} bits cannot be packed into bytes; use 2, 4 or 8")
        if group is None and along == TOKENS:
            raise ValueError("a group of tokens needs a number of them; use cache.group=32")
        if group is not None and group * bits % 8:
            raise ValueError(
                f"cache.group={group} numbers of {bits} bits do not fill bytes; use a multiple of"
                f" {8 // bits}"
            )
        self.bits = bits
        self.along = along
        self.group = group
        self.levels = 2**bits - 1

    def quantize(self, numbers: Tensor, valid: Tensor | None = None) -> Quantized:
        """Quantises [B, t, ..., D].

        Args:
            valid: [B, t] bool; numbers of other tokens do not shape the groups they lie in, and
                return as any finite number. None: all are valid.
        """
        grouped = self._grouped(numbers)
        if valid is None:
            minimum = grouped.amin(-1)
            maximum = grouped.amax(-1)
        else:
            counted = valid.reshape(*valid.shape, *[1] * (numbers.ndim - 2)).expand_as(numbers)
            counted = self._grouped(counted)
            minimum = torch.where(counted, grouped, torch.inf).amin(-1)
            maximum = torch.where(counted, grouped, -torch.inf).amax(-1)
            nothing = minimum > maximum
            minimum = minimum.masked_fill(nothing, 0)
            maximum = maximum.masked_fill(nothing, 0)
        scale = (maximum - minimum) / self.levels
        divisor = torch.where(scale > 0, scale, 1)
        codes = (grouped - minimum[..., None]) / divisor[..., None]
        return Quantized(self._pack(codes.clamp(0, self.levels).round()), scale, minimum)

    def dequantize(self, quantized: Quantized) -> Tensor:
        """Returns [B, t, ..., D], in the dtype of the scales."""
        codes = self._unpack(quantized.codes).to(quantized.scale.dtype)
        grouped = codes * quantized.scale[..., None] + quantized.minimum[..., None]
        if self.along == TOKENS:
            return grouped.movedim(-1, 2).flatten(1, 2)
        return grouped.flatten(-2)

    def bytes(self, shape: torch.Size, element_size: int) -> int:
        """Returns the bytes of a quantised tensor of this shape, computed without one.

        bits / 8 for each number, and a scale and a minimum for each group.

        Args:
            element_size: bytes of a number before.
        """
        numbers = shape.numel()
        group = shape[-1] if self.group is None else self.group
        return numbers * self.bits // 8 + numbers // group * 2 * element_size

    def check(self, channels: int) -> None:
        """Checks that tensors with so many channels in a head can be quantised.

        Raises:
            ValueError: groups of channels do not divide them, or do not fill bytes.
        """
        if self.along == TOKENS:
            return
        group = channels if self.group is None else self.group
        if channels % group or group * self.bits % 8:
            raise ValueError(
                f"cache.group={self.group} does not divide a head of {channels} channels into whole"
                f" bytes of {self.bits}-bit codes; use a divisor of {channels} that is a multiple"
                f" of {8 // self.bits}"
            )

    def _grouped(self, numbers: Tensor) -> Tensor:
        """[B, t, ..., D] -> [B, n, ..., D, G] or [B, t, ..., D / G, G]."""
        if self.along == TOKENS:
            assert self.group is not None
            return numbers.unflatten(1, (-1, self.group)).movedim(2, -1)
        group = numbers.shape[-1] if self.group is None else self.group
        return numbers.unflatten(-1, (-1, group))

    def _pack(self, codes: Tensor) -> Tensor:
        """[..., G] codes -> [..., G bits / 8] uint8."""
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, device=codes.device) * self.bits
        parts = codes.to(torch.int32).unflatten(-1, (-1, per_byte)) << shifts
        return parts.sum(-1).to(torch.uint8)

    def _unpack(self, packed: Tensor) -> Tensor:
        """[..., G bits / 8] uint8 -> [..., G] int32."""
        per_byte = 8 // self.bits
        shifts = torch.arange(per_byte, device=packed.device) * self.bits
        return (packed.to(torch.int32)[..., None] >> shifts & self.levels).flatten(-2)
