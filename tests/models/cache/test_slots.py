"""Slots are given in order, given back by the mask, and never hold padding."""

import torch

from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.slots import SlotTable
from models.masks.basic import Causal, FirstTokens, SameDocument, SlidingWindow
from models.micro_batch import MicroBatch
from models.span import PADDING, Span
from tests.support.decoders import built
from tests.support.pieces import addresses, cut, piece_span

CAUSAL = Causal() & SameDocument()


def steps(first: int, count: int, doc: int = 0):
    for pos in range(first, first + count):
        yield Span.of(torch.tensor([[pos]]), torch.tensor([[doc]]))


def held(table: SlotTable, row: int = 0) -> list[tuple[int, int]]:
    span = table.read()
    valid = span.valid()[row]
    return list(zip(span.doc[row][valid].tolist(), span.pos[row][valid].tolist(), strict=True))


def test_a_window_keeps_its_own_length_and_little_more():
    table = SlotTable(CAUSAL & SlidingWindow(6), block=4)
    for span in steps(0, 200):
        table.place(span)
        assert table.capacity <= 12
        last = held(table)[-1][1]
        assert set(range(max(0, last - 5), last + 1)) <= {pos for _, pos in held(table)}


def test_a_long_prompt_gives_its_slots_back():
    table = SlotTable(CAUSAL & SlidingWindow(6), block=4)
    table.place(Span.line(1, 100))
    for span in steps(100, 1):
        table.place(span)
    assert table.capacity <= 12
    assert held(table) == [(0, pos) for pos in range(96, 101)] or len(held(table)) <= 7


def test_first_tokens_stay():
    table = SlotTable(CAUSAL & (SlidingWindow(5) | FirstTokens(2)), block=4)
    for span in steps(0, 60):
        table.place(span)
    positions = [pos for _, pos in held(table)]
    assert positions[:2] == [0, 1]
    assert positions[-5:] == list(range(55, 60))
    assert len(positions) <= 12


def test_a_document_that_ended_gives_its_slots_back():
    table = SlotTable(CAUSAL, block=4)
    for span in (*steps(0, 8), *steps(0, 8, doc=1)):
        table.place(span)
    assert held(table)[-8:] == [(1, pos) for pos in range(8)]
    assert table.capacity <= 12


def test_rows_take_slots_of_their_own():
    table = SlotTable(CAUSAL, block=2)
    span = addresses()
    for index in cut(span):
        piece = piece_span(span, index)
        table.place(piece)
        assert table.read() is table.read()
    whole = [(doc, pos) for doc, pos in zip(span.doc[0].tolist(), span.pos[0].tolist()) if doc >= 0]
    # What ended may have been given back; what is left is the end of the row, in order.
    left = held(table)
    assert left == whole[len(whole) - len(left) :]
    assert left[-11:] == [(2, pos) for pos in range(11)]
    assert (table.read().doc[:, -1] == PADDING).tolist().count(True) >= 1


@torch.no_grad()
def test_reads_of_one_payload_are_held_once():
    """Key-value memory reads the same slots at each hop."""
    model = built("key_value")
    state = DecodingState(Contiguous(block=4))
    model(MicroBatch(torch.zeros(1, 4, dtype=torch.long), state.attach(Span.line(1, 4))))
    state.advance()
    assert list(state.caches) == ["read#0"]
    # Two parts of one head of 24 channels, 4 tokens, in float64, and tails of 1 and of 2 tokens.
    assert state.bytes() == 8 * 24 * (2 * 4 + 1 + 2)
