"""Causal filters as long as the sequence, by FFT: three transforms forward and three backward.

Tensors are token-major outside and channel-major inside; they are transposed a block of tokens at a
time, which on a CPU takes a third of the time of a whole transposition. Backward is written out
because that of torch's real transforms goes through complex ones of the full length.

Letters: G stretches, n tokens of each, C channels, L taps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096  # tokens transposed at a time


def convolve(x: Tensor, taps: Tensor, shift: int) -> Tensor:
    """Returns n outputs [G, n, C], beginning `shift` tokens after the first of the n inputs.

    Args:
        x: [G, n, C].
        taps: [L, C], float32 or float64 as x is; those from L on count as 0.
    """
    return _Convolve.apply(x, taps, shift)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, shift: int) -> Tensor:
        length = x.shape[1]
        # Taps outside of [low, shift + length) meet no pair of an input and an output.
        low = max(0, shift - length + 1)
        used_taps = taps[low : shift + length]
        ctx.first = shift - low
        ctx.low = low
        ctx.used = len(used_taps)
        ctx.taps_shape = taps.shape
        signal = _spectrum(x, 2 * length, 0)
        response = _spectrum(used_taps[None], 2 * length, 0)
        ctx.save_for_backward(signal, response)
        # The convolution is circular; what wraps round falls on outputs that are not read.
        return _tokens(signal * response, ctx.first, length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        signal, response = ctx.saved_tensors
        length = grads[0].shape[1]
        d_output = _spectrum(grads[0], 2 * length, ctx.first)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _tokens(d_output * response.conj(), 0, length)
        d_taps = None
        if ctx.needs_input_grad[1]:
            d_taps = grads[0].new_zeros(ctx.taps_shape)
            d_response = (d_output * signal.conj()).sum(0, keepdim=True)
            d_taps[ctx.low : ctx.low + ctx.used] = _tokens(d_response, 0, ctx.used)[0]
        return d_x, d_taps, None


def _spectrum(x: Tensor, size: int, first: int) -> Tensor:
    """Transforms x [G, n, C], placed at `first` among `size` zeros -> [G, C, size / 2 + 1]
    complex."""
    length = x.shape[1]
    signal = x.new_empty(x.shape[0], x.shape[2], size)
    signal[..., :first] = 0
    signal[..., first + length :] = 0
    for start in range(0, length, BLOCK):
        block = x[:, start : start + BLOCK]
        signal[..., first + start : first + start + block.shape[1]] = block.mT
    return torch.fft.rfft(signal)


def _tokens(spectrum: Tensor, first: int, length: int) -> Tensor:
    """Transforms back, [G, C, size / 2 + 1] -> the tokens from `first` on, [G, length, C]."""
    signal = torch.fft.irfft(spectrum)  # the size is even, which is irfft's default
    tokens = signal.new_empty(signal.shape[0], length, signal.shape[1])
    for start in range(0, length, BLOCK):
        stop = min(length, start + BLOCK)
        tokens[:, start:stop] = signal[..., first + start : first + stop].mT
    return tokens
