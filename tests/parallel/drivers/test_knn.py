"""Memorizing over ranks: rows of lanes, one after another, equal one device; bytes do not depend on
the size of the store."""

from functools import partial

import pytest
import torch
from torch import nn

from models.attention.full import Attention
from models.kernels.knn import KeyValueStore
from models.masks.basic import SameDocument
from models.memory.lookup import Memorizing
from models.positions.rope import Rope
from models.primitives.knn import KNN
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.knn import ShardedKNN
from parallel.layout import POLICIES, zigzag
from parallel.sharding import shard_span
from tests.support.lanes import WIDTH, compare, poisoned
from tests.support.pool import ranks

METHODS = {2: "ulysses", 3: "ring", 4: "usp"}


def mixer(length: int, segment: int | None, count: int = 3) -> nn.Module:
    memory = Memorizing(length, segment=segment, layers=[1], count=count, device="cpu")
    return memory.around(Attention(WIDTH, 4, 2, Rope()), layer=1, layers=2)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("length, segment", [(40, None), (11, None), (40, 4), (11, 5)])
def test_rows_of_lanes_are_those_of_one_device(length, segment, policy, size):
    build = partial(mixer, length, segment)
    for worst in ranks(size, compare, build, METHODS[size], policy, torch.float64):
        assert max(worst.values()) < 1e-11, worst


@pytest.mark.parametrize("segment", [None, 4])
def test_single_precision_is_exact_to_its_rounding_where_there_is_no_choice(segment):
    for worst in ranks(
        3, compare, partial(mixer, 40, segment, 99), "allgather", "zigzag", torch.float32
    ):
        assert max(worst.values()) < 2e-5, worst


def sent(env, entries: int) -> dict[str, int]:
    """Bytes that this rank sends when 24 queries of 4 heads search a store of so many entries,
    shared out."""
    tokens, communicator = 24, Communicator(env.group)
    here = shard_span(Span.line(1, tokens), [zigzag(tokens, env.size)], env.rank)
    generator = torch.Generator().manual_seed(env.rank)
    q = torch.randn(
        1, here.shape[1], 4, 8, generator=generator, dtype=torch.float64, requires_grad=True
    )
    k = torch.randn(1, entries // env.size, 2, 8, generator=generator, dtype=torch.float64)
    pos = torch.arange(entries // env.size)[None] + env.rank * entries
    store = KeyValueStore(k, k, Span.of(pos, torch.zeros_like(pos)))
    out, _ = ShardedKNN(KNN(SameDocument(), 5), communicator)(
        (q,), [store], (torch.ones(4, dtype=torch.float64),), span=here
    )
    out.sum().backward()
    return communicator.bytes_sent


@pytest.mark.parametrize("size", [2, 3])
def test_the_store_stays_where_it_is(size):
    few, many = (ranks(size, sent, entries) for entries in (60, 6000))
    queries = 24 // size * 4
    for each in (*few, *many):
        assert each["recall"] == size * queries * (
            8 * 8 + 5 * 24
        )  # a query's channels, and what it found so far
        assert each["recall entries"] <= size * queries * 5 * 16 * 8
        assert set(each) == {"recall", "recall asks", "recall entries"}  # nothing in backward


@pytest.mark.parametrize("segment", [None, 4])
def test_a_document_that_is_not_a_number_stays_by_itself(segment):
    assert max(ranks(3, poisoned, partial(mixer, 40, segment), "zigzag")) < 1e-11
