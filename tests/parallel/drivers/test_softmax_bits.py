"""Models that are no decoders, NTM, LSTM and key-value memory, over rows of lanes that are cut over
ranks: as on one device."""

from functools import lru_cache

import pytest
import torch
import torch.distributed as dist

from models.architectures.key_value import KeyValue
from models.architectures.lstm import Lstm
from models.architectures.ntm import NeuralTuringMachine
from models.carried_state import CarriedState, name_stateful_modules
from models.init import initialise
from models.loss import IGNORE
from models.memory.segments import SegmentMemory
from models.micro_batch import MicroBatch
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.context_parallel import METHODS, apply_context_parallel
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.lanes import ROWS, TOKENS, span
from tests.support.parity import EXACT, GRID_HEADS, grid, relative
from tests.support.pool import ranks

VOCABULARY = 19
MODELS = {
    "turing": lambda: NeuralTuringMachine(
        VOCABULARY, 7, 2, SegmentMemory(0), slots=6, slot_width=4
    ),
    "turing with lstm": lambda: NeuralTuringMachine(
        VOCABULARY, 5, 2, SegmentMemory(0), slots=9, slot_width=3, reach=2, controller="lstm"
    ),
    "lstm": lambda: Lstm(VOCABULARY, 6, 2, SegmentMemory(0)),
    "key value": lambda: KeyValue(VOCABULARY, 8, hops=2, fact=3),
    "key value shared": lambda: KeyValue(VOCABULARY, 8, hops=3, fact=2, shared=True),
    "key value of every token": lambda: KeyValue(VOCABULARY, 8, hops=1, fact=1),
}


def given(step):
    """Tokens of both lanes, and targets at about half of those that are no padding."""
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(VOCABULARY, (2, 2, TOKENS), generator=generator)
    asked = torch.rand(2, TOKENS, generator=generator) < 0.5
    return tokens, torch.where(asked & span(step).valid(), targets, IGNORE)


def made(name, dtype):
    """With heads that differ and move: where all are spread evenly over the slots, what aims them
    has hardly a gradient."""
    model = initialise(MODELS[name](), seed=3).double()
    if isinstance(model, NeuralTuringMachine):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(4)
            model.aim.bias.add_(
                2 * torch.randn(model.aim.bias.shape, generator=generator, dtype=torch.float64)
            )
    name_stateful_modules(model)
    return model.to(dtype)


@lru_cache(maxsize=4)
def truth(name, dtype):
    """Of every row on one device: losses, logits, gradients; and what is kept at the end."""
    model, past, found = made(name, dtype), CarriedState(), []
    for step in range(len(ROWS)):
        tokens, targets = given(step)
        model.zero_grad()
        here = past.attach(span(step))
        losses = model(MicroBatch(tokens, here, targets))
        losses.sum().backward()
        with torch.no_grad():
            logits = model(MicroBatch(tokens, here))
        past.advance()
        found.append(
            (losses.detach(), logits, {key: p.grad.clone() for key, p in model.named_parameters()})
        )
    return found, past.export_state()


def compare(env, name, method, policy, dtype):
    """Worst relative difference of all that one device gives."""
    want, kept = truth(name, dtype)
    model, past, worst = made(name, dtype), ShardedCarriedState(Communicator(env.group)), {}
    side = GRID_HEADS[env.size] if method == "usp" else 1
    apply_context_parallel(
        model, env.group, method, grid=grid(env, side) if method == "usp" else None
    )
    for step, (losses, logits, grads) in enumerate(want):
        tokens, targets = given(step)
        here = past.attach(
            shard_span(span(step), layouts(policy, span(step), env.size, heads=side), env.rank)
        )
        shard, valid = here.sharding.shard, here.valid()
        model.zero_grad()
        got = model(MicroBatch(shard(tokens, 0), here, shard(targets, IGNORE)))
        got.sum().backward()
        with torch.no_grad():
            said = model(MicroBatch(shard(tokens, 0), here))
        past.advance()
        worst[step, "losses"] = relative(got.detach(), shard(losses, 0))
        worst[step, "logits"] = relative(
            said * valid[..., None], shard(logits, 0) * valid[..., None]
        )
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, f"{key} has no gradient on rank {env.rank}"
            dist.all_reduce(parameter.grad, group=env.group)
            worst[step, key] = relative(parameter.grad, grads[key])
    whole = past.export_state()
    assert set(whole) == set(kept)
    worst |= {("kept", key): relative(value, kept[key]) for key, value in whole.items()}
    return max(worst.values()), max(worst, key=lambda key: worst[key])


CASES = [
    (name, method, list(POLICIES)[(row + turn) % len(POLICIES)], (2, 3, 4)[(row + turn) % 3])
    for row, name in enumerate(MODELS)
    for turn, method in enumerate(METHODS if name.startswith("key") else ["ring"] * 3)
    if not (name.startswith("key") and method == "ulysses")  # one head is not traded
]


@pytest.mark.short(
    "dtype0-turing-ring-contiguous-2",
    "dtype0-turing with lstm-ring-zigzag-3",
    "dtype0-lstm-ring-zigzag-3",
    "dtype0-key value-ring-contiguous-2",
    "dtype0-key value shared-allgather-contiguous-2",
    "dtype0-key value of every token-allgather-zigzag-3",
)
@pytest.mark.parametrize(
    ("name", "method", "policy", "size"), [case for case in CASES if case[1] != "usp"]
)
@pytest.mark.parametrize("dtype", EXACT)
def test_over_ranks_it_is_what_it_is_on_one_device(name, method, policy, size, dtype):
    for figure, where in ranks(size, compare, name, method, policy, dtype):
        assert figure < EXACT[dtype], (where, figure)
