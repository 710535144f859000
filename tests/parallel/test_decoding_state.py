"""Decoding over ranks: a sharded prompt, then steps whose tokens every rank has."""

from unittest import mock

import pytest
import torch

import parallel.decoding_state as sharded
from models.cache.contiguous import Contiguous
from models.cache.decodable import shortest_piece
from models.cache.decoding_state import DecodingState
from models.micro_batch import MicroBatch
from models.primitives.sequential import SequentialScan
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from parallel.decoding_state import ShardedDecodingState
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.models.cache.test_decoding_state import PREFIX_PIECES, SEES_AHEAD, made
from tests.support.decoders import MODELS, WORDS, built
from tests.support.parity import GRID_HEADS, grid, methods_of
from tests.support.pieces import PIECES, addresses, cut, piece_span, put, taken
from tests.support.pool import ranks
from tests.variants import VARIANTS, WIDTH

SPAN = addresses()


def given(model):
    generator = torch.Generator().manual_seed(3)
    if hasattr(model, "vocabulary") or hasattr(model, "embed"):
        return torch.randint(WORDS, SPAN.shape, generator=generator)
    return torch.randn(*SPAN.shape, WIDTH, generator=generator, dtype=torch.float64)


def build(name):
    return built(name) if name in MODELS else made(name)


def called(model, x, span):
    """What a whole model gives to tokens, or a layer to vectors."""
    return model(x, span) if x.is_floating_point() else model(MicroBatch(x, span))


def piece(model, x, state, index, env, policy, heads):
    """The piece whole on every rank, or sharded by a layout."""
    span = piece_span(SPAN, index)
    part = taken(x, index, 0)
    if policy is None:
        return called(model, part, state.attach(span))
    rows = layouts(policy, span, env.size, heads=heads)
    span = shard_span(span, rows, env.rank)
    y = called(model, span.sharding.shard(part, 0), state.attach(span))
    size = env.size
    every = state.communicator.all_to_all([y] * size, [y.numel()] * size)
    whole = span.sharding.to_global_order(torch.cat([one.view(y.shape) for one in every], 1))
    return whole[:, : part.shape[1]]


def error(y, truth):
    valid = SPAN.valid()
    return float((y[valid] - truth[valid]).abs().max() / truth[valid].abs().max())


@torch.no_grad()
@mock.patch.object(sharded, "OWNED", 3)  # for this call alone: the pool goes on
def worker(env, cases, policies):
    """Differences from whole rows on one device, and from a state that went to one process."""
    found = {}
    for number, (name, method) in enumerate(cases):
        one = build(name)
        x = given(one)
        truth = called(one, x, SPAN)
        model = build(name)
        side = GRID_HEADS[env.size] if method == "usp" else 1
        sides = grid(env, side) if method == "usp" else None
        apply_context_parallel(model, env.group, method, grid=sides)
        communicator = Communicator(env.group)
        state = ShardedDecodingState(Contiguous(block=4), communicator)
        sequential = any(isinstance(m, SequentialScan) for m in one.modules())
        policy = None if sequential else policies[number % len(policies)]
        heads = side
        first = PREFIX_PIECES if shortest_piece(one) else PIECES
        y = torch.full_like(truth, torch.nan)
        pieces = list(cut(SPAN, first))
        for turn, index in enumerate(pieces):
            here = policy if turn == 0 else None
            part = piece(model, x, state, index, env, here, heads)
            state.advance()
            put(y, index, part)
            if turn == 4:
                # What all ranks hold goes on with one process, and with these ranks again.
                whole = state.export_state()
                alone = DecodingState(Contiguous(block=4))
                alone.import_state(whole)
                next_index = pieces[turn + 1]
                span = piece_span(SPAN, next_index)
                again = called(one, taken(x, next_index, 0), alone.attach(span))
                held = next_index >= 0
                exact = taken(truth, next_index, 0)
                moved = float((again[held] - exact[held]).abs().max())
                state = ShardedDecodingState(Contiguous(block=4), communicator)
                state.import_state(whole)
        found[name] = error(y, truth), moved
    return found


def cases_of(part: int, parts: int) -> list[tuple[str, str]]:
    """Every model with one of the methods that serve it."""
    methods = methods_of()
    cases = []
    for number, name in enumerate(name for name in VARIANTS if name not in SEES_AHEAD):
        served = methods[name]
        cases.append((name, served[number % len(served)]))
    for number, name in enumerate(MODELS):
        cases.append((name, ("ring", "allgather", "auto")[number % 3]))
    return cases[part::parts]


@pytest.mark.short("3-1")
@pytest.mark.parametrize(("size", "part"), [(2, 0), (3, 1), (4, 2)])
def test_steps_after_a_sharded_prompt_equal_whole_rows(size, part):
    cases = cases_of(part, 3)
    for found in ranks(size, worker, cases, list(POLICIES)):
        wrong = {name: errors for name, errors in found.items() if not max(errors) < 1e-11}
        assert not wrong
