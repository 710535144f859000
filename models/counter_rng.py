"""Random numbers that are a function of where a token sits, not of what was drawn before: the same
however it was cut.

Counter-based, as Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3") argue for; the
mixing function is the finaliser of SplitMix64 (Steele et al. 2014). torch's own generators would
depend on the order of draws, hence on the cut.
"""

import hashlib

import torch
from torch import Tensor

from models.layer import Layer
from models.span import Span

DOC_BITS = 32  # a position within a document takes as many


class CounterRNG(Layer):
    """Uniform numbers for one purpose of one layer, anew at every step.

    Args:
        seed, purpose, layer: what the numbers are a function of, beside the step, the token's
            address and the channel.

    The step arrives through `on_step_begin`; it is 0 before the first.
    """

    step: Tensor

    def __init__(self, seed: int, purpose: str, layer: int):
        super().__init__()
        digest = hashlib.blake2b(f"{seed}/{purpose}/{layer}".encode(), digest_size=8).digest()
        self.word = int.from_bytes(digest, "little", signed=True)
        self.register_buffer("step", torch.zeros((), dtype=torch.long), persistent=False)

    def reset_buffers(self) -> None:
        """Back to before step 1; for a model that was built on the meta device."""
        self.step = torch.zeros_like(self.step)

    def on_step_begin(self, step: int) -> None:
        """Step numbers start at 1."""
        self.step.fill_(step)

    def forward(self, address: Tensor, channels: int) -> Tensor:
        """[..., channels] float64 in [0, 1) for address [...] int64."""
        token = mix_bits(mix_bits(address) + mix_bits(self.step + self.word))
        channel = mix_bits(torch.arange(1, channels + 1, device=address.device))
        return _shifted(mix_bits(token[..., None] + channel), 11).double() * 2.0**-53


def address(span: Span) -> Tensor:
    """[B, T] int64: a number for each token, whatever the cut; another in another row where
    documents are numbered so."""
    return (span.doc << DOC_BITS) + span.pos


def mix_bits(x: Tensor) -> Tensor:
    """int64 -> int64, one to one; every bit of the result depends on every bit of `x`."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def hash_words(*words: int | Tensor) -> Tensor:
    """Non-negative int64 numbers that look random: a pure function of whole numbers, the same on
    every device.

    Source: the finaliser of splitmix64 (Steele et al. 2014), applied after each word.
    """
    state = torch.zeros((), dtype=torch.long)
    for word in words:
        # A number on the CPU meets a tensor of any device without being sent there.
        state = (state ^ word) + -7046029254386353131
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            state = (state ^ ((state >> shift) & ((1 << (64 - shift)) - 1))) * factor
        state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return state & ((1 << 62) - 1)
