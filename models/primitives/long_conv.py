"""Long convolution: a causal filter per channel, as long as the sequence, by FFT.

Contributions of disjoint tokens add up, so a driver may convolve any two stretches. Every document
is convolved by itself, so none can touch another: stretches of equal padded length share one FFT.

The primitive has no parameters. Letters: B rows, T tokens, S source tokens, C channels, L taps, G
pairs of stretches.
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
from models.masks.algebra import visible
from models.masks.basic import Causal, SameDocument
from models.plans import planned
from models.primitive import Primitive
from models.primitives.causal_conv import with_tail
from models.same_graph import tied
from models.scores import Tensors
from models.span import PADDING, Span, to_device

CAUSAL = Causal() & SameDocument()
FEW = 4  # tokens of a row up to which a decoding convolution sums without transforms


class Fragment(NamedTuple):
    """A stretch of one document: tokens [start, start + length) of a row.

    `pos` is the position of the first of them.
    """

    row: int
    start: int
    length: int
    doc: int
    pos: int


class FragmentPair(NamedTuple):
    """Output tokens `into` and the source tokens `kv_span` that contribute to them."""

    length: int  # padded length of both
    shift: int  # positions from the first source token to the first output token
    into: Fragment
    kv_span: Fragment


class LongConv(Primitive, StatefulModule):
    """y_t = sum_{j <= t} filter_j x_{t-j} within a document; float32, or float64 where x is.

    Source: Poli et al. 2023 (arXiv:2302.10866). Ours respects documents, and convolves any two
    stretches of one document. Where rows continue earlier ones (Span.past), their tokens within
    reach of the filter contribute too, and no gradient flows through those. Where the tokens at
    hand continue their rows, the earlier ones are held as they came in, and each new output sums
    over them: a step costs as many products as there are tokens.
    """

    continues_rows = True

    def forward(self, payload: Tensors, params: Tensors, *, span: Span) -> Tensor:
        """Returns the filtered tokens [B, T, C].

        Args:
            payload: (x [B, T, C],).
            params: (filter [L, C],).

        Raises:
            ValueError: a document has more tokens than the filter has taps.
        """
        if span.past is not None and span.past.continues_rows:
            held, held_span = span.past.extend(self.place, payload, span, CAUSAL)
            if span.shape[1] <= FEW:
                output = self._sums(held[0], params[0], span, held_span)
            else:
                output = self.partial(held, params, span=span, kv_span=held_span)
            return span.past.summed(output)
        x, span, skip = self.widened(payload, params, span=span)
        return self.partial((x,), params, span=span, kv_span=span)[:, skip:]

    def _sums(self, x: Tensor, taps: Tensor, span: Span, kv_span: Span) -> Tensor:
        """Returns what `partial` does, without transforms: [B, T, C] of a few tokens."""
        distance = span.pos[:, :, None] - kv_span.pos[:, None]
        seen = visible(CAUSAL, span, kv_span)[:, 0]
        if bool((seen & (distance >= len(taps))).any()):
            raise ValueError(self._too_long(len(taps)))
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = taps.to(wide)[distance.clamp(0, len(taps) - 1)]
        weights = weights.masked_fill(~seen[..., None], 0)
        return torch.einsum("btsc,bsc->btc", weights, x.to(wide)).to(x.dtype)

    @staticmethod
    def _too_long(taps: int) -> str:
        return (
            f"the filter has {taps} taps and a document more tokens; raise context_length to the"
            " longest row, or, where rows go on, the mixer's own context_length to the longest"
            " document"
        )

    def widened(self, payload: Tensors, params: Tensors, *, span: Span) -> tuple[Tensor, Span, int]:
        """Prepends the tokens carried from earlier rows; see `with_tail`.

        Where a piece begins its rows, it is only held for those that follow.
        """
        past = span.past
        if past is not None and past.continues_rows and not past.carries_gradient:
            past.extend(self.place, payload, span, CAUSAL)
            return payload[0], span, 0
        return with_tail(self.place, payload[0], len(params[0]) - 1, span)

    def partial(self, payload: Tensors, params: Tensors, *, span: Span, kv_span: Span) -> Tensor:
        """Returns what tokens addressed by `kv_span` contribute to those addressed by `span`.

        Args:
            payload: (x [B, S, C],).

        Returns:
            [B, T, C].
        """
        (x,) = payload
        (taps,) = params
        wide = torch.promote_types(x.dtype, torch.float32)
        pairs = fragment_pairs(span, kv_span)
        x_flat = x.flatten(0, 1).to(wide)
        taps = taps.to(wide)
        targets = []
        contributions = []
        for length, shift, group in _groups(pairs):
            if shift + max(pair.into.length for pair in group) > len(taps):
                raise ValueError(self._too_long(len(taps)))
            sources = [pair.kv_span for pair in group]
            source_index = to_device(_flat_index(sources, kv_span.shape[1], length), x.device)
            outputs = [pair.into for pair in group]
            output_index = _flat_index(outputs, span.shape[1], length).flatten()
            source = x_flat[source_index.clamp_min(0)]
            source = source.masked_fill((source_index < 0)[..., None], 0)
            used = (output_index >= 0).nonzero()[:, 0]
            targets.append(to_device(output_index[used], x.device))
            convolved = convolve(source, taps, shift).flatten(0, 1)
            contributions.append(convolved.index_select(0, to_device(used, x.device)))
        output = x_flat.new_zeros(span.shape[0] * span.shape[1], x.shape[2])
        if contributions:
            output = output.index_add(0, torch.cat(targets), torch.cat(contributions))
        else:
            # Padding alone: the graph must still reach the inputs, as it does on other ranks.
            output = tied(output, x_flat, taps)
        return output.view(*span.shape, x.shape[2]).to(x.dtype)


def _fragments(span: Span) -> list[Fragment]:
    """Returns every unbroken stretch of a document in these rows."""
    pos, doc = on_host(span)
    fragments = []
    for row, (row_pos, row_doc) in enumerate(zip(pos, doc)):
        breaks = (np.diff(row_pos) != 1) | (np.diff(row_doc) != 0)
        edges = [0, *(1 + np.flatnonzero(breaks)).tolist(), len(row_pos)]
        for start, stop in zip(edges[:-1], edges[1:]):
            if stop > start and row_doc[start] != PADDING:
                document = int(row_doc[start])
                position = int(row_pos[start])
                fragments.append(Fragment(row, start, stop - start, document, position))
    return fragments


@planned
def fragment_pairs(span: Span, kv_span: Span) -> list[FragmentPair]:
    """Returns what `_pairs` does, worked out once for all layers."""
    return span.cache.get("convolution", lambda: _pairs(span, kv_span), kv_span)


def _pairs(span: Span, kv_span: Span) -> list[FragmentPair]:
    """Returns all pairs of stretches of one document whose output does not wholly precede the
    source."""
    sources: dict[tuple[int, int], list[Fragment]] = {}
    for fragment in _fragments(kv_span):
        sources.setdefault((fragment.row, fragment.doc), []).append(fragment)
    pairs = []
    for into in _fragments(span):
        for source in sources.get((into.row, into.doc), ()):
            shift = into.pos - source.pos
            if shift + into.length > 0:
                pairs.append(_pair(into, source, shift))
    return sorted(pairs, key=lambda pair: pair[:2])


def _pair(into: Fragment, source: Fragment, shift: int) -> FragmentPair:
    if shift < 0:
        # The first output tokens lie before the source: nothing contributes to them.
        into = into._replace(
            start=into.start - shift, length=into.length + shift, pos=into.pos - shift
        )
    length = _padded(max(into.length, source.length))
    return FragmentPair(length, max(0, shift), into, source)


def _padded(length: int) -> int:
    """Rounds up to one of 1, 2, 3, 4, 6, 8, 12, 16, ...: lengths with a fast transform."""
    power = 1 << max(0, length - 1).bit_length()
    three_quarters = power * 3 // 4
    if power >= 4 and length <= three_quarters:
        return three_quarters
    return power


def _groups(pairs: list[FragmentPair]) -> Iterator[tuple[int, int, list[FragmentPair]]]:
    """Yields (length, shift, pairs) for pairs that one call can convolve; they come sorted."""
    for (length, shift), group in groupby(pairs, key=lambda pair: pair[:2]):
        yield length, shift, list(group)


def _flat_index(fragments: list[Fragment], row_length: int, length: int) -> Tensor:
    """Returns the index of each token among all rows end to end, [G, length] int64 on the CPU.

    -1 after the end of a fragment.
    """
    starts = [fragment.row * row_length + fragment.start for fragment in fragments]
    lengths = [fragment.length for fragment in fragments]
    start = torch.tensor(starts, device="cpu")[:, None]
    steps = torch.arange(length, device="cpu")
    inside = steps < torch.tensor(lengths, device="cpu")[:, None]
    return torch.where(inside, start + steps, -1)
