"""Pieces and steps of every causal mixer give what the whole rows give."""

import pytest
import torch
from torch import Tensor, nn

from models.cache.contiguous import Contiguous
from models.cache.decodable import cannot_decode, shortest_piece
from models.cache.decoding_state import DecodingState
from models.carried_state import name_stateful_modules
from models.init import initialise
from models.span import Span
from tests.support.pieces import addresses, cut, piece_span, put, taken
from tests.variants import VARIANTS, WIDTH, Taught

SEES_AHEAD = {
    "bidirectional",
    "bidirectional_t5",
    "longformer_symmetric",
    "bigbird_symmetric",
}
# Documents of which the first 5 tokens see one another, so these come in one piece.
PREFIX_PIECES = ((13, 1, 6), (3, 8, 12, 1, 2), (5, 1))


def made(name: str) -> nn.Module:
    """The mixer in float64, its parameters spread out so that nothing is equal by chance."""
    model = initialise(VARIANTS[name](), seed=1).double().eval()
    # The wrapper of compressed attention adds a loss, which only a pass with gradients makes.
    model = model.inner if isinstance(model, Taught) else model
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    name_stateful_modules(model)
    return model


def in_pieces(model: nn.Module, x: Tensor, span: Span, state: DecodingState, first=None) -> Tensor:
    """What the model gives when rows come piece by piece."""
    y = torch.full_like(x, torch.nan)
    pieces = cut(span) if first is None else cut(span, first)
    for index in pieces:
        # Padding may hold anything: NaN would spread if a layer read it.
        part = model(taken(x, index, torch.nan), state.attach(piece_span(span, index)))
        state.advance()
        put(y, index, part)
    return y


def error(y: Tensor, truth: Tensor, span: Span) -> float:
    """The largest difference at tokens, relative to the largest magnitude."""
    valid = span.valid()
    return float((y[valid] - truth[valid]).abs().max() / truth[valid].abs().max())


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in SEES_AHEAD])
@torch.no_grad()
def test_pieces_equal_whole_rows(name):
    model = made(name)
    assert not cannot_decode(model)
    span = addresses()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    truth = model(x, span)
    first = PREFIX_PIECES if shortest_piece(model) else None
    y = in_pieces(model, x, span, DecodingState(Contiguous(block=4)), first)
    assert error(y, truth, span) < 1e-11


@pytest.mark.parametrize("name", sorted(SEES_AHEAD))
def test_what_sees_ahead_is_refused(name):
    (sentence,) = cannot_decode(made(name))
    assert "sees later tokens" in sentence
