"""Convolution: a causal filter per channel, as long as the sequence. Contributions of disjoint
tokens add up.

Documents are convolved each for itself, so none can touch another: pieces of equal padded length go
through one FFT. A leaf without parameters. Letters: B rows, T tokens, S source tokens, C channels,
L taps.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.carried_state import StatefulModule
from models.kernels.fft_conv import convolve
from models.kernels.scan_chunks import on_host
from models.primitive import Primitive
from models.primitives.causal_conv import with_tail
from models.same_graph import tied
from models.scores import Tensors
from models.span import PADDING, Span


class Fragment(NamedTuple):
    """A stretch of one document: tokens [start, start + length) of a row, the first of which has
    position pos."""

    row: int
    start: int
    length: int
    doc: int
    pos: int


class FragmentPair(NamedTuple):
    """Tokens `into` that hear tokens `of`; `shift` = how far the first of `into` lies after the
    first of `of`."""

    length: int  # to which both are padded
    shift: int
    into: Fragment
    kv_span: Fragment


class LongConv(Primitive, StatefulModule):
    """y_t = sum_{j <= t} filter_j x_{t-j} within a document, by FFT; float32, or float64 where x
    is.

    Source: Poli et al. 2023 (arXiv:2302.10866). Ours knows documents, and convolves any two
    stretches of one document. Where rows go on from those before (Span.past), it hears all of their
    tokens that the filter reaches, and nothing is learned through those.
    """

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """[B, T, C]; payload (x [B, T, C],), params (filter [L, C],).

        Raises:
            ValueError: a document has more tokens than the filter has taps.
        """
        x, span, skip = self.widened(payload, params, span=span)
        return self.partial((x,), params, span=span, kv_span=span)[:, skip:]

    def widened(self, payload: Tensors, params: Tensors, *, span: Span) -> tuple[Tensor, Span, int]:
        """x [B, S, C] with what was kept in front, the addresses of both, and how many tokens are
        in front."""
        return with_tail(self.place, payload[0], len(params[0]) - 1, span)

    def partial(self, payload: Tensors, params: Tensors, *, span: Span, kv_span: Span) -> Tensor:
        """[B, T, C]: what the tokens of payload [B, S, C], addressed by `of`, give to those
        addressed by `at`."""
        (x,) = payload
        (taps,) = params
        wide = torch.promote_types(x.dtype, torch.float32)
        key = ("convolution", id(kv_span))
        if key not in span.plans:
            span.plans[key] = (
                kv_span,
                _pairs(span, kv_span),
            )  # `of` is kept, so that its id stays its own
        x_flat = x.flatten(0, 1).to(wide)
        taps = taps.to(wide)
        size = span.shape[0] * span.shape[1]
        wheres = []
        parts = []
        for length, shift, group in _groups(span.plans[key][1]):
            if shift + max(pair.into.length for pair in group) > len(taps):
                raise ValueError(
                    f"the filter has {len(taps)} taps and a document more tokens; raise"
                    " context_length to the longest row, or, where rows go on, the mixer's own"
                    " context_length to the longest document"
                )
            here = _places(
                (
                    (p.kv_span.row * kv_span.shape[1] + p.kv_span.start, p.kv_span.length)
                    for p in group
                ),
                length,
            ).to(x.device)
            into = _places(
                ((p.into.row * span.shape[1] + p.into.start, p.into.length) for p in group), length
            ).flatten()
            source = x_flat[here.clamp_min(0)].masked_fill((here < 0)[..., None], 0)
            told = (into >= 0).nonzero()[:, 0]
            wheres.append(into[told].to(x.device))
            parts.append(
                convolve(source, taps, shift).flatten(0, 1).index_select(0, told.to(x.device))
            )
        out = x_flat.new_zeros(size, x.shape[2])
        if parts:
            out = out.index_add(0, torch.cat(wheres), torch.cat(parts))
        else:  # padding alone
            out = tied(out, x_flat, taps)
        return out.view(*span.shape, x.shape[2]).to(x.dtype)


def _pieces(span: Span) -> list[Fragment]:
    pos, doc = on_host(span)
    found = []
    for row, (p, d) in enumerate(zip(pos, doc)):
        edges = [0, *(1 + np.flatnonzero((np.diff(p) != 1) | (np.diff(d) != 0))).tolist(), len(p)]
        for a, b in zip(edges[:-1], edges[1:]):
            if b > a and d[a] != PADDING:
                found.append(Fragment(row, a, b - a, int(d[a]), int(p[a])))
    return found


def _pairs(span: Span, kv_span: Span) -> list[FragmentPair]:
    """Every two pieces of one document of which the first is not wholly before the second."""
    sources: dict[tuple[int, int], list[Fragment]] = {}
    for piece in _pieces(kv_span):
        sources.setdefault((piece.row, piece.doc), []).append(piece)
    pairs = []
    for into in _pieces(span):
        for source in sources.get((into.row, into.doc), ()):
            shift = into.pos - source.pos
            if shift + into.length > 0:
                pairs.append(_pair(into, source, shift))
    return sorted(pairs, key=lambda pair: pair[:2])


def _pair(into: Fragment, kv_span: Fragment, shift: int) -> FragmentPair:
    if shift < 0:  # the earliest of `into` hear nothing
        into = into._replace(
            start=into.start - shift, length=into.length + shift, pos=into.pos - shift
        )
    return FragmentPair(_padded(max(into.length, kv_span.length)), max(0, shift), into, kv_span)


def _padded(length: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: lengths that are quick to transform."""
    power = 1 << max(0, length - 1).bit_length()
    return power * 3 // 4 if power >= 4 and length <= power * 3 // 4 else power


def _groups(pairs: list[FragmentPair]) -> Iterator[tuple[int, int, list[FragmentPair]]]:
    for (length, shift), group in groupby(pairs, key=lambda pair: pair[:2]):
        yield length, shift, list(group)


def _places(stretches: Iterator[tuple[int, int]], length: int) -> Tensor:
    """[G, length] int64 on the CPU: start, start + 1, ... for as long as each stretch is, then
    -1."""
    starts, lengths = (torch.tensor(x, device="cpu")[:, None] for x in zip(*stretches))
    steps = torch.arange(length, device="cpu")
    return torch.where(steps < lengths, starts + steps, -1)
