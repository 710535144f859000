"""Whole models token by token: memories, hybrids, experts, recurrent models."""

import pytest
import torch

from models.cache.contiguous import Contiguous
from models.cache.decodable import cannot_decode
from models.cache.decoding_state import DecodingState
from models.micro_batch import MicroBatch
from models.moe.switch import Switch
from models.primitive import Primitive
from tests.support.decoders import MODELS, WORDS, attention, built, stack
from tests.support.pieces import addresses, cut, piece_span, put, taken
from tests.variants import WIDTH


def tokens_of(span):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(WORDS, span.shape, generator=generator)


def worst(y, truth, span):
    valid = span.valid()
    return float((y[valid] - truth[valid]).abs().max() / truth[valid].abs().max())


def continued(model, state, tokens, span, y, pieces):
    for index in pieces:
        part = model(MicroBatch(taken(tokens, index, 0), state.attach(piece_span(span, index))))
        state.advance()
        put(y, index, part)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_pieces_equal_whole_rows(name):
    model = built(name)
    assert not cannot_decode(model)
    span = addresses()
    tokens = tokens_of(span)
    truth = model(MicroBatch(tokens, span))
    y = torch.full_like(truth, torch.nan)
    continued(model, DecodingState(Contiguous(block=4)), tokens, span, y, cut(span))
    assert worst(y, truth, span) < 1e-11


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_rows_leave_join_and_are_exported(name):
    """Between two pieces rows 0 and 2 go on elsewhere, come back in another order with row 1 below
    them, and everything is exported and imported."""
    model = built(name)
    span = addresses()
    tokens = tokens_of(span)
    truth = model(MicroBatch(tokens, span))
    pieces = list(cut(span))
    y = torch.full_like(truth, torch.nan)
    state = DecodingState(Contiguous(block=4))
    continued(model, state, tokens, span, y, pieces[:3])

    order = torch.tensor([2, 0, 1])
    alone = DecodingState(Contiguous(block=4))
    alone.import_state({path: x.clone() for path, x in state.export_state().items()})
    state.select(order[:2])
    alone.select(order[2:])
    # The caches of a state that was imported are made at its first pass; a join needs them.
    left = [piece[order] for piece in pieces[3:]]
    there = y[order]
    moved_span = span.map(lambda field: field[order])
    apart = slice(0, 2), slice(2, 3)
    for one, rows in zip((state, alone), apart):
        part = there[rows]
        continued(
            model,
            one,
            tokens[order][rows],
            moved_span.map(lambda field, rows=rows: field[rows]),
            part,
            [left[0][rows]],
        )
        there[rows] = part
    state.join(alone)
    continued(model, state, tokens[order], moved_span, there, left[1:])
    assert worst(there, truth[order], moved_span) < 1e-11


def test_what_drops_tokens_by_their_number_is_refused():
    model = stack([attention()], feedforward=lambda layer: Switch(WIDTH, 20, experts=4))
    (sentence,) = cannot_decode(model)
    assert "eval_capacity_factor=null" in sentence


def test_a_primitive_that_reads_no_past_is_refused():
    class Blind(Primitive):
        pass

    mixer = attention()
    mixer.add_module("blind", Blind())
    (sentence,) = cannot_decode(stack([mixer]))
    assert sentence.startswith("blocks.0.mixer.blind (Blind)")
