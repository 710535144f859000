"""Sinusoidal positions: a wave for every pair of channels, added to the token embeddings.

Letters: B rows, T tokens.
"""

import torch
from torch import Tensor, nn

from models.init import INIT_STD
from models.layer import Layer
from models.positions.base import Position
from models.ranges import Positive
from models.span import Span


class Sinusoidal(Position):
    """Adds sin(p / theta^(2i / width)) to channel 2i and the cosine to channel 2i + 1.

    Args:
        theta: wavelengths run from 2 pi to 2 pi theta tokens.
        amplitude: factor of the waves. The paper has 1 and multiplies embeddings of deviation 1 /
            sqrt(width) by sqrt(width); here embeddings are not multiplied and start with a
            deviation of 0.02, so waves of 0.02 keep the proportion.

    Source: Vaswani et al. 2017 (arXiv:1706.03762), section 3.5.
    """

    def __init__(self, theta: float = 10_000.0, amplitude: Positive = INIT_STD):
        if theta <= 1:
            raise ValueError(
                f"position.theta is a wavelength in tokens and must be above 1; got {theta}"
            )
        if amplitude <= 0:
            raise ValueError(
                f"position.amplitude={amplitude} leaves no positions; use a positive number, or"
                " position=none"
            )
        self.theta = theta
        self.amplitude = amplitude

    def embedding(self, width: int) -> nn.Module | None:
        """A module (span) -> [B, T, width] without parameters."""
        return SinusoidTable(width, self.theta, self.amplitude)


class SinusoidTable(Layer):
    """(span) -> [B, T, width]: the waves at every token's position, in the dtype of the model."""

    precision: Tensor

    def __init__(self, width: int, theta: float, amplitude: float):
        super().__init__()
        self.width = width
        self.theta = theta
        self.amplitude = amplitude
        # it holds no value: it follows the model's dtype and device, as a parameter would
        self.register_buffer("precision", torch.zeros(()), persistent=False)

    def reset_buffers(self) -> None:
        """Gives the buffer memory after a model was built on the meta device."""
        self.precision = torch.zeros_like(self.precision)

    def forward(self, span: Span) -> Tensor:
        """[B, T, width], in the dtype that the model was given."""
        # bfloat16 has 8 bits: positions above 256 would share their waves
        dtype = torch.promote_types(self.precision.dtype, torch.float32)
        waves = sinusoid(span.pos.to(dtype), self.width, self.theta)
        interleaved = torch.stack(waves, -1).flatten(-2)[..., : self.width]
        return (interleaved * self.amplitude).to(self.precision.dtype)


def sinusoid(distance: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Sines and cosines of distances [...], each [..., width / 2 rounded up], fastest first."""
    pair = torch.arange(-(-width // 2), device=distance.device, dtype=distance.dtype)
    angle = distance[..., None] * base ** -(2 * pair / width)
    return angle.sin(), angle.cos()
