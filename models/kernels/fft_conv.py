"""Causal filters as long as the sequence, by FFT: three transforms forward, three backward, and no
more.

Tensors are token-major outside and channel-major inside; they are turned a block of tokens at a
time, which on a CPU takes a third of the time of a whole transposition. Backward is written out
because that of torch's real transforms goes through complex ones of the full length.

Letters: G stretches, n tokens of each, C channels, L taps.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 4096  # tokens turned at a time


def convolve(x: Tensor, taps: Tensor, shift: int) -> Tensor:
    """[G, n, C]: n outputs beginning `shift` tokens after the first of the n inputs x [G, n, C].

    Args:
        taps: [L, C], float32 or float64 as x is; those from L on count as 0.
    """
    return _Convolve.apply(x, taps, shift)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taps: Tensor, shift: int) -> Tensor:
        length = x.shape[1]
        low = max(0, shift - length + 1)
        cut = taps[low : shift + length]
        ctx.first = shift - low
        ctx.low = low
        ctx.sharding = len(cut)
        ctx.taps = taps.shape
        signal = _spectrum(x, 2 * length, 0)
        response = _spectrum(cut[None], 2 * length, 0)
        ctx.save_for_backward(signal, response)
        return _tokens(
            signal * response, ctx.first, length
        )  # what wraps round falls on outputs that are not read

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        signal, response = ctx.saved_tensors
        length = grads[0].shape[1]
        told = _spectrum(grads[0], 2 * length, ctx.first)
        d_x = _tokens(told * response.conj(), 0, length) if ctx.needs_input_grad[0] else None
        d_taps = None
        if ctx.needs_input_grad[1]:
            d_taps = grads[0].new_zeros(ctx.taps)
            d_taps[ctx.low : ctx.low + ctx.sharding] = _tokens(
                (told * signal.conj()).sum(0, keepdim=True), 0, ctx.sharding
            )[0]
        return d_x, d_taps, None


def _spectrum(x: Tensor, size: int, first: int) -> Tensor:
    """[G, n, C] -> [G, C, size / 2 + 1] complex, of x standing at `first` in `size` places, the
    others 0."""
    length = x.shape[1]
    room = x.new_empty(x.shape[0], x.shape[2], size)
    room[..., :first] = 0
    room[..., first + length :] = 0
    for start in range(0, length, BLOCK):
        block = x[:, start : start + BLOCK]
        room[..., first + start : first + start + block.shape[1]] = block.mT
    return torch.fft.rfft(room)


def _tokens(spectrum: Tensor, first: int, length: int) -> Tensor:
    """[G, C, size / 2 + 1] -> [G, length, C]: what stands at `first` and after."""
    whole = torch.fft.irfft(spectrum)  # of an even number of places
    found = whole.new_empty(whole.shape[0], length, whole.shape[1])
    for start in range(0, length, BLOCK):
        stop = min(length, start + BLOCK)
        found[:, start:stop] = whole[..., first + start : first + stop].mT
    return found
