"""The paged cache is exact, shares pages by content, and gives all of them back."""

import gc

import pytest
import torch

from models.attention.full import Attention
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.paged import Paged
from models.cache.paged_pool import PoolFull
from models.positions.rope import Rope
from models.span import PADDING, Span
from tests.models.cache.eviction.test_eviction_in_models import decoded, error, made
from tests.support.pieces import addresses, cut, piece_span, put, taken

WIDTH, HEADS, GROUPS = 24, 6, 3


def mixer():
    return made(Attention(WIDTH, HEADS, GROUPS, Rope()))


def pool_of(factory):
    ((pool, _),) = factory._pools.values()
    return pool


def fed(model, state, rows, start, announced=True):
    """Feeds rows of token numbers; the input of a token is a vector of its own."""
    table = torch.randn(100, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    tokens = torch.tensor(rows)
    pos = torch.arange(start, start + tokens.shape[1]).expand_as(tokens)
    span = Span.of(pos, torch.where(tokens < 0, PADDING, 0))
    y = model(
        table[tokens.clamp_min(0)], state.attach(span, tokens.clamp_min(0) if announced else None)
    )
    state.advance()
    return y


@torch.no_grad()
def test_it_equals_the_contiguous_cache_through_growth_and_uneven_rows():
    model = mixer()
    span = addresses()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    y, state = decoded(model, x, span, Paged(3, None))
    exact, _ = decoded(model, x, span, Contiguous())
    assert error(y, exact, span) < 1e-13
    assert state.bytes() == sum(-(-n // 3) for n in (25, 26, 9)) * 3 * 2 * GROUPS * 4 * 8


@torch.no_grad()
def test_samples_of_a_prompt_share_pages_and_copy_one_when_they_part():
    model = mixer()
    factory = Paged(4)
    state = DecodingState(factory)
    prompt = list(range(10))
    fed(model, state, [prompt], 0)
    pool = pool_of(factory)
    state.select(torch.tensor([0, 0, 0]))
    assert state.counters() == {"pages": 3, "pages_shared": 3}
    answers = [[20, 21, 22], [30, 31, 32], [20, 41, 42]]
    outputs = []
    for step in range(3):
        outputs.append(fed(model, state, [[answer[step]] for answer in answers], 10 + step))
        if step == 0:
            # two copied the last page, the third wrote to it
            assert pool.pages - pool.free_pages() == 5
    for row, answer in enumerate(answers):
        alone = DecodingState(Contiguous())
        truth = fed(model, alone, [prompt + answer], 0)[0, 10:]
        for step in range(3):
            assert torch.allclose(outputs[step][row, 0], truth[step], atol=1e-12)


@torch.no_grad()
def test_requests_with_one_beginning_share_its_full_pages_also_later():
    model = mixer()
    factory = Paged(4)
    state = DecodingState(factory)
    beginning = list(range(9))
    fed(model, state, [[*beginning, 50, 51], [*beginning, 60, -1]], 0)
    pool = pool_of(factory)
    assert state.counters() == {"pages": 4, "pages_shared": 2}
    other = DecodingState(factory)
    y = fed(model, other, [[*beginning, 70]], 0)
    assert pool.readers(0) == 3
    state.join(other)
    truth = fed(model, DecodingState(Contiguous()), [[*beginning, 70]], 0)
    assert torch.allclose(y, truth, atol=1e-12)
    # pages are found by tokens and positions, never without them
    silent = DecodingState(factory)
    fed(model, silent, [[*beginning, 80]], 0, announced=False)
    moved = DecodingState(factory)
    fed(model, moved, [[*beginning, 80]], 3)
    assert pool.readers(0) == 3


@torch.no_grad()
def test_pages_come_back_when_rows_leave_and_when_a_state_is_dropped():
    model = mixer()
    factory = Paged(4)
    state = DecodingState(factory)
    fed(model, state, [list(range(9)), list(range(20, 29))], 0)
    pool = pool_of(factory)
    assert pool.pages - pool.free_pages() == 6
    state.select(torch.tensor([1]))
    assert pool.pages - pool.free_pages() == 3
    del state
    gc.collect()
    assert pool.free_pages() == pool.pages
    assert not pool.sequences()


@torch.no_grad()
def test_a_pool_of_fixed_size_says_what_is_missing():
    model = mixer()
    state = DecodingState(Paged(4, 3))
    fed(model, state, [list(range(12))], 0)
    with pytest.raises(PoolFull) as error:
        fed(model, state, [[50, 51, 52, 53, 54]], 12)
    assert error.value.missing == 2


@torch.no_grad()
def test_rows_are_carried_elsewhere():
    model = mixer()
    span = addresses(((30,), (17,), (22,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    first = ((9, 3), (12, 2), (4, 4))
    truth, _ = decoded(model, x, span, Contiguous(), first)
    state = DecodingState(Paged(4))
    y = torch.full_like(x, torch.nan)
    for number, index in enumerate(cut(span, first)):
        if number == 5:
            moved = DecodingState(Paged(5))
            moved.import_state(state.export_state())
            state = moved
        part = model(taken(x, index, torch.nan), state.attach(piece_span(span, index)))
        state.advance()
        put(y, index, part)
    assert error(y, truth, span) < 1e-12
