"""Layers that differ from full attention in what they see: who touches whom, and the numbers."""

import pytest
import torch

from models.attention.bidirectional import Bidirectional
from models.attention.chunked import Chunked
from models.attention.prefix import PrefixAttention
from models.attention.sinks import Sinks
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.positions.alibi import Alibi
from models.positions.rope import Rope
from models.span import PREFIX, TEXT, Span
from tests.support.spelled_out_attention import HEADS, KV, WIDTH, furthest, given, spelled, touched

# Row 0 holds documents at tokens 0..12, 13, 14..37 and 38..46, then padding.
START, STOP = 14, 38


def test_bidirectional_sees_its_whole_document_and_no_other():
    layer, x, span = given(Bidirectional(WIDTH, HEADS, KV, Rope()))
    assert touched(layer, x, span, 20) == set(range(START, STOP))
    assert furthest(layer(x, span), spelled(layer, x, span, SameDocument()), span) < 1e-12


def test_a_prefix_is_seen_by_all_of_its_document_and_the_rest_is_causal():
    layer, x, span = given(PrefixAttention(WIDTH, HEADS, KV, Rope(), length=5))
    assert touched(layer, x, span, START + 1) == set(range(START, START + 5))
    assert touched(layer, x, span, START + 9) == set(range(START, START + 10))
    mask = SameDocument() & (Causal() | FirstTokens(5))
    assert furthest(layer(x, span), spelled(layer, x, span, mask), span) < 1e-12


def test_a_prefix_told_by_roles_is_one_told_by_length():
    by_length, x, span = given(PrefixAttention(WIDTH, HEADS, KV, Rope(), length=5))
    by_role, _, _ = given(PrefixAttention(WIDTH, HEADS, KV, Rope(), length=0))
    marked = Span(span.pos, span.doc, torch.where(span.pos < 5, PREFIX, TEXT))
    assert furthest(by_role(x, marked), by_length(x, span), span) < 1e-12
    assert touched(by_role, x, span, START + 1) == {START, START + 1}


def test_sinks_stay_visible_behind_the_window():
    layer, x, span = given(Sinks(WIDTH, HEADS, KV, Rope(), window=4, sink_tokens=2))
    assert touched(layer, x, span, 30) == {START, START + 1, 27, 28, 29, 30}
    assert touched(layer, x, span, START + 1) == {START, START + 1}
    mask = Causal() & SameDocument() & (SlidingWindow(4) | FirstTokens(2))
    assert furthest(layer(x, span), spelled(layer, x, span, mask), span) < 1e-12


def test_chunks_are_counted_from_the_documents_first_token():
    layer, x, span = given(Chunked(WIDTH, HEADS, KV, Rope(), size=8))
    assert touched(layer, x, span, START + 8) == {START + 8}
    assert touched(layer, x, span, START + 13) == set(range(START + 8, START + 14))
    mask = Causal() & SameDocument() & SameChunk(8)
    assert furthest(layer(x, span), spelled(layer, x, span, mask), span) < 1e-12


def test_bidirectional_attention_meets_alibi_on_both_sides():
    layer, x, span = given(Bidirectional(WIDTH, HEADS, HEADS, Alibi()))
    bias = layer.mix.score.bias(span, span, torch.arange(HEADS), torch.float64)
    assert torch.equal(bias[0, :, 20, 25], bias[0, :, 25, 20])
    assert (
        furthest(layer(x, span), spelled(layer, x, span, SameDocument(), lambda s: s + bias), span)
        < 1e-12
    )


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: PrefixAttention(WIDTH, HEADS, KV, Rope(), length=-1),
        lambda: Sinks(WIDTH, HEADS, KV, Rope(), window=4, sink_tokens=0),
        lambda: Sinks(WIDTH, HEADS, KV, Rope(), window=0),
        lambda: Chunked(WIDTH, HEADS, KV, Rope(), size=0),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"use|want"):
        wrong()
