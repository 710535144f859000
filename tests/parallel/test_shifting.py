"""`overflow=shift` over ranks: each turns the keys that it holds, and all is as on one device."""

from unittest import mock

import pytest
import torch

import parallel.decoding_state as sharded
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.streaming import Streaming
from models.cache.overflow import policy_of
from models.cache.quantized import QuantizedKV
from models.cache.shifting import cannot_shift, shift
from models.cache.turning import turns
from models.convolution.short_conv import ShortConv
from models.micro_batch import MicroBatch
from models.recurrent.linear import LinearAttention
from models.span import PADDING, Span
from parallel.collectives import Communicator
from parallel.context_parallel import METHODS, apply_context_parallel
from parallel.decoding_state import ShardedDecodingState
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.models.cache.eviction.test_eviction_in_models import Two
from tests.models.cache.test_overflow import HEADS, MIXERS, VOCABULARY, WIDTH, small
from tests.support.parity import GRID_HEADS, grid
from tests.support.pieces import addresses
from tests.support.pool import ranks
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.scheduler import Scheduler, TextRequest

# The last document of a row is longer than its window, or so short that some rank holds none of it.
PROMPT = addresses(((5, 1, 17), (22, 2), (19,)))
STEPS = 3
# Of the last document of each row; the second loses nothing.
CUTS = ((2, 9), (0, 0), (4, 10))
METHOD_NAMES = (*METHODS, "auto")


def convolved():
    """Attention above a short convolution."""
    model = small(MIXERS["rope"])
    model.first = small(lambda: ShortConv(WIDTH)).first
    return model


MODELS = {name: lambda name=name: small(MIXERS[name]) for name in MIXERS} | {"conv": convolved}


def driven(model, env, method):
    """The model with drivers."""
    side = GRID_HEADS[env.size] if method == "usp" else 1
    sides = grid(env, side) if method == "usp" else None
    apply_context_parallel(model, env.group, method, grid=sides)
    return model, side


def run(model, make, policy=None, env=None, heads=1):
    """Logits of every step around two shifts, the second right after an import."""
    state = make()
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (3, 100), generator=generator)
    whole = tokens[:, : PROMPT.shape[1]]
    if policy is None:
        model(MicroBatch(whole, state.attach(PROMPT)))
    else:
        span = shard_span(PROMPT, layouts(policy, PROMPT, env.size, heads=heads), env.rank)
        model(MicroBatch(span.sharding.shard(whole, 0), state.attach(span)))
    state.advance()
    last = PROMPT.doc.amax(1)
    length = ((PROMPT.doc == last[:, None]) & (PROMPT.doc != PADDING)).sum(1)
    logits = []
    start, stop = torch.tensor(CUTS).T
    for turn in range(2):
        for step in range(STEPS):
            there = torch.tensor([True, True, step > 0])
            doc = torch.where(there, last, PADDING)[:, None]
            pos = torch.where(there, length, 0)[:, None]
            token = tokens[:, 50 + 10 * turn + step][:, None]
            given = model(MicroBatch(token, state.attach(Span.of(pos, doc))))
            state.advance()
            length = length + there
            logits.append(torch.where(there[:, None], given[:, 0], 0))
        if turn == 0:
            shift(state, start, stop, turns(model))
            length = length - (stop - start)
            exported = state.export_state()
            state = make()
            state.import_state(exported)
            shift(state, start, stop - 3 * (stop > start), turns(model))
            length = length - (stop - 3 * (stop > start) - start)
    return torch.stack(logits)


@torch.no_grad()
@mock.patch.object(sharded, "OWNED", 2)  # for this call alone: the pool goes on
def worker(env, cases):
    found = {}
    for name, method, policy in cases:
        truth = run(MODELS[name](), lambda: DecodingState(Contiguous(block=4)))
        model, heads = driven(MODELS[name](), env, method)
        assert not cannot_shift(model, Contiguous()), (name, method)
        communicator = Communicator(env.group)

        def make(communicator=communicator):
            return ShardedDecodingState(Contiguous(block=4), communicator)

        given = run(model, make, policy, env, heads)
        found[name, method, policy] = float((given - truth).abs().max() / truth.abs().max())
    return found


@pytest.mark.short("3")
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_shift_over_ranks_is_that_of_one_device(size):
    cases = []
    policies = list(POLICIES)
    for number, name in enumerate(MODELS):
        for turn, method in enumerate(METHOD_NAMES):
            if (turn + number + size) % 2:
                policy = policies[(turn + number) % len(policies)]
                cases.append((name, method, policy))
    for found in ranks(size, worker, cases):
        assert len(found) == len(cases)
        wrong = {case: error for case, error in found.items() if not error < 1e-11}
        assert not wrong


@torch.no_grad()
@mock.patch.object(sharded, "OWNED", 2)
def texts(env, method):
    """Greedy texts of ten times the context, on one device and over the ranks."""
    found = []
    for over_ranks in (False, True):
        model = small(MIXERS["rope"])
        communicator = None
        if over_ranks:
            model, _ = driven(model, env, method)
            communicator = Communicator(env.group)
        scheduler = Scheduler(
            model,
            rows=2,
            communicator=communicator,
            policy="contiguous" if over_ranks else None,
            limit=ContextLimit(policy_of("shift", 2), 16),
        )
        requests = [TextRequest(prompt, 40) for prompt in ([1, 2, 3], [4, 5, 6, 7, 8, 9], [2, 2])]
        for request in requests:
            scheduler.submit(request)
        for _ in scheduler.run():
            pass
        found.append([request.tokens for request in requests])
    return found


def test_texts_at_the_end_of_their_context_do_not_depend_on_ranks():
    for alone, together in ranks(3, texts, "auto"):
        assert alone == together
        assert [len(text) for text in together] == [40, 40, 40]


def refused(env):
    """What is said of a model with drivers."""
    model, _ = driven(Two(LinearAttention(WIDTH, HEADS)), env, "ring")
    sentences = cannot_shift(model, Contiguous())
    rotated, _ = driven(Two(small(MIXERS["rope"])), env, "allgather")
    sentences += cannot_shift(rotated, QuantizedKV())
    # Other caches turn keys too.
    holder = small(MIXERS["rope"])
    driven(holder, env, "ring")
    sentences += Streaming(8, 2).misfits(holder)
    return sentences


def test_what_cannot_be_shifted_over_ranks_is_said_by_name():
    for sentences in ranks(2, refused):
        state, cache = sentences
        assert "holds a state from which no token can be taken out" in state
        assert "QuantizedKV does not hold all of them" in cache
