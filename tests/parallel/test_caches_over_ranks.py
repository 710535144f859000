"""Caches over ranks: those that evict hold the same tokens on every rank as on one device."""

from unittest import mock

import pytest
import torch

import parallel.decoding_state as sharded
from models.attention.full import Attention
from models.cache.decoding_state import DecodingState
from models.cache.eviction.h2o import H2O
from models.cache.eviction.snapkv import SnapKV
from models.cache.eviction.streaming import Streaming
from models.cache.eviction.tova import Tova
from models.cache.eviction.window import Window
from models.cache.paged import Paged
from models.cache.quantized import QuantizedKV
from models.positions.rope import Rope
from parallel.collectives import Communicator
from parallel.decoding_state import ShardedDecodingState
from tests.models.cache.eviction.test_eviction_in_models import error, made
from tests.support.pieces import addresses, cut, piece_span, put, taken
from tests.support.pool import ranks

WIDTH, HEADS, GROUPS = 24, 6, 3
FACTORIES = {
    "h2o": lambda: H2O(6, 2),
    "snapkv": lambda: SnapKV(6, 2, 3),
    "tova": lambda: Tova(6),
    "window": lambda: Window(6),
    "streaming": lambda: Streaming(6, 2),
    "paged": lambda: Paged(4),
}
SPAN = addresses(((30,), (17,), (22,)))
FIRST = ((9, 3), (12, 2), (4, 4))


def read(model, state):
    """What the model gives, and which tokens its cache holds in the end."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(*SPAN.shape, WIDTH, generator=generator, dtype=torch.float64)
    y = torch.full_like(x, torch.nan)
    for index in cut(SPAN, FIRST):
        part = model(taken(x, index, torch.nan), state.attach(piece_span(SPAN, index)))
        state.advance()
        put(y, index, part)
    (cache,) = state.caches.values()
    _, span = cache.read()
    return y, torch.where(span.valid(), span.pos, -1).tolist()


@torch.no_grad()
@mock.patch.object(sharded, "OWNED", 3)  # for this call alone: the pool goes on
def worker(env):
    results = {}
    for name, make in FACTORIES.items():
        model = made(Attention(WIDTH, HEADS, GROUPS, Rope()))
        factory = make()
        factory.prepare(model)
        truth, held = read(model, DecodingState(factory))
        factory = make()
        factory.prepare(model)
        y, held_here = read(model, ShardedDecodingState(factory, Communicator(env.group)))
        results[name] = error(y, truth, SPAN), held_here == held
    return results


@pytest.mark.parametrize("size", [3])
def test_choices_and_outputs_are_those_of_one_device(size):
    for results in ranks(size, worker):
        for name, (difference, same) in results.items():
            assert difference < 1e-12, name
            # pages are shared out by position, so no rank holds all of them
            assert same == (name != "paged"), name


def test_quantised_keys_lie_in_groups_of_one_rank():
    """Groups are whole where neighbouring tokens of a rank are: 64 are, and 32 make a group."""
    assert sharded.OWNED % QuantizedKV().key_group == 0
