"""A row that was put aside ends in the tokens that it would have had."""

import pytest
import torch

from models.attention.full import Attention
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.h2o import H2O
from models.cache.paged import Paged
from models.cache.preemption import swap_in, swap_out
from models.cache.quantized import QuantizedKV
from models.convolution.short_conv import ShortConv
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.recurrent.linear import LinearAttention
from models.span import PADDING, Span
from tests.models.cache.test_overflow import small

WIDTH, HEADS, GROUPS = 24, 6, 3
MIXERS = {
    "attention": lambda: Attention(WIDTH, HEADS, GROUPS, Rope()),
    "scan": lambda: LinearAttention(WIDTH, HEADS),
    "convolution": lambda: ShortConv(WIDTH),
}
CACHES = {
    "contiguous": lambda: Contiguous(block=4),
    "paged": lambda: Paged(4),
    "quantized": lambda: QuantizedKV(4, 4, group=4, residual=4),
    "h2o": lambda: H2O(6, 2),
}
PROMPTS = ([1, 2, 3, 4, 5, 6, 7], [8, 9, 10])
STEPS = 24


def feed(model, state, pieces, begin):
    most = max(len(piece) for piece in pieces)
    tokens = torch.tensor([[*piece, *[0] * (most - len(piece))] for piece in pieces])
    pos = torch.tensor(begin)[:, None] + torch.arange(most)
    there = torch.arange(most) < torch.tensor([len(piece) for piece in pieces])[:, None]
    logits = model(
        MicroBatch(tokens, state.attach(Span.of(pos, torch.where(there, 0, PADDING)), tokens))
    )
    state.advance()
    last = torch.tensor([len(piece) - 1 for piece in pieces])
    return logits[torch.arange(len(pieces)), last].argmax(-1).tolist()


def texts(model, factory, put_aside):
    """Greedy texts of two rows; the second sits out some steps in between."""
    state = DecodingState(factory)
    made = [[token] for token in feed(model, state, PROMPTS, [0, 0])]
    waiting = None
    running = [0, 1]
    while min(len(each) for each in made) < STEPS:
        done = len(made[0])
        if put_aside and done == 6:
            waiting = swap_out(state, 1)
            state.select(torch.tensor([0]))
            running = [0]
        if waiting is not None and done == 15:
            swap_in(state, waiting, torch.device("cpu"))
            waiting = None
            running = [0, 1]
        begin = [len(PROMPTS[row]) + len(made[row]) - 1 for row in running]
        tokens = feed(model, state, [made[row][-1:] for row in running], begin)
        for row, token in zip(running, tokens, strict=True):
            made[row].append(token)
    return [each[:STEPS] for each in made]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mixer", MIXERS)
@torch.no_grad()
def test_a_row_that_waited_in_host_memory_ends_in_the_same_tokens(mixer, cache):
    model = small(MIXERS[mixer])
    made = texts(model, CACHES[cache](), put_aside=True)
    assert made == texts(model, CACHES[cache](), put_aside=False)
    assert len(set(made[1])) > 1
