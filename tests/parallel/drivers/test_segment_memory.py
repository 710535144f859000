"""Transformer-XL over ranks: rows that go on give what they give on one device."""

from functools import partial

import pytest
import torch
from torch import nn

from models.carried_state import name_stateful_modules
from models.init import initialise
from models.memory.base import Memory
from models.memory.segments import SegmentMemory
from models.primitives.long_conv import LongConv
from tests.support.knn_rows import build, compare
from tests.support.parity import EXACT
from tests.support.pool import ranks
from tests.variants import WIDTH

MEMORY = {"row": (11, None), "short": (7, 5), "long": (26, 4), "one": (1, None)}  # length, segment


def make(name, length, segment, dtype):
    return build(name, SegmentMemory(length, segment), dtype)


def worker(env, name, memory, method, policy):
    length, segment = MEMORY[memory]
    return [
        compare(env, partial(make, name, length, segment), method, policy, dtype) for dtype in EXACT
    ]


CASES = [
    ("full", "row", "ring", "zigzag", 3),
    ("full", "short", "ring", "balanced", 4),
    ("full", "long", "allgather", "zigzag", 2),
    ("full", "one", "allgather", "contiguous", 4),
    ("full", "short", "ulysses", "zigzag", 3),
    ("full", "row", "ulysses", "balanced", 2),
    ("full", "short", "usp", "contiguous", 4),
    ("full", "row", "usp", "zigzag", 4),
    ("full", "short", "auto", "zigzag", 3),
    ("relative", "row", "ring", "contiguous", 4),
    ("relative", "short", "ulysses", "balanced", 3),
    ("relative", "long", "allgather", "balanced", 2),
    ("relative", "short", "usp", "zigzag", 2),
    ("alibi", "short", "ring", "zigzag", 2),
    ("t5", "short", "ring", "zigzag", 3),
    ("latent", "short", "ring", "zigzag", 3),
    ("latent", "row", "ulysses", "zigzag", 2),
    ("differential_t5", "short", "ring", "zigzag", 2),
    ("differential_alibi", "row", "usp", "zigzag", 3),
    ("gated", "short", "allgather", "zigzag", 3),
    ("qk_norm", "short", "ring", "contiguous", 3),
    ("sliding", "short", "auto", "contiguous", 3),
    ("sliding", "row", "allgather", "zigzag", 4),
    ("sinks", "short", "ring", "zigzag", 2),
    ("sink_logit", "row", "ulysses", "zigzag", 3),
    ("chunked", "row", "allgather", "balanced", 3),
    ("prefix", "short", "ring", "zigzag", 3),
    ("bidirectional", "short", "ring", "zigzag", 3),
    ("softcap", "row", "ring", "zigzag", 2),
    ("longformer", "short", "ring", "zigzag", 3),
    ("longformer", "row", "ulysses", "zigzag", 2),
    ("bigbird", "short", "allgather", "zigzag", 3),
]


# Each method, each way in which a score knows of the memory, and latents; the rest of the table
# repeats them under another mask or layout.
FIRST = [
    ("full", "row", "ring", "zigzag", 3),
    ("full", "one", "allgather", "contiguous", 4),
    ("full", "short", "ulysses", "zigzag", 3),
    ("relative", "short", "usp", "zigzag", 2),
    ("alibi", "short", "ring", "zigzag", 2),
    ("t5", "short", "ring", "zigzag", 3),
    ("latent", "short", "ring", "zigzag", 3),
    ("sliding", "short", "auto", "contiguous", 3),
]


@pytest.mark.parametrize(
    ("name", "memory", "method", "policy", "size"),
    [case if case in FIRST else pytest.param(*case, marks=pytest.mark.full) for case in CASES],
    ids=lambda x: str(x),
)
def test_a_cut_is_invisible_over_rows_that_go_on(name, memory, method, policy, size):
    found = [max(each) for each in zip(*ranks(size, worker, name, memory, method, policy))]
    for worst, (dtype, bound) in zip(found, EXACT.items()):
        assert worst < bound, f"{worst} in {dtype}"


CARRYING = [
    ("linear", "ring", "zigzag", 3),
    ("retention", "ring", "contiguous", 4),
    ("gated_linear", "ulysses", "balanced", 2),
    ("rwkv6", "ring", "zigzag", 3),
    ("rwkv7", "ring", "balanced", 4),
    ("gated_delta", "ring", "zigzag", 2),
    ("mamba2", "ring", "balanced", 3),
    ("performer", "ring", "zigzag", 4),
    ("delta", "ring", "contiguous", 3),
    ("short_conv", "ring", "zigzag", 4),
    ("short_conv", "ring", "balanced", 2),
    ("channel_mix", "ring", "contiguous", 3),
    ("hyena", "ring", "zigzag", 3),
    ("hyena", "ring", "balanced", 2),
]


def recurrent(name, dtype):
    return build(
        name, Memory(), dtype, scale=1
    )  # larger weights make retention's norm ill-conditioned in float32


class Narrow(nn.Module):
    """A long filter over fewer channels than there are ranks, which goes round a ring."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)
        # a layer's own parameters start as its constructor fills them
        drawn = torch.Generator().manual_seed(1)
        self.taps = nn.Parameter(torch.randn(60, 2, generator=drawn) * 0.1)
        self.mix = LongConv()

    def forward(self, x, span):
        return self.up(self.mix((self.down(x),), (self.taps,), span=span))


def narrow(dtype):
    model = Narrow()
    name_stateful_modules(model)
    return initialise(model, seed=1).to(dtype)


def narrowed(env):
    return [compare(env, narrow, "ring", "zigzag", dtype) for dtype in EXACT]


def test_a_filter_that_goes_round_hears_the_rows_before_too():
    for found in ranks(3, narrowed):
        assert all(worst < bound for worst, bound in zip(found, EXACT.values())), found


def carried(env, name, method, policy):
    return [compare(env, partial(recurrent, name), method, policy, dtype) for dtype in EXACT]


# A state, a state with the delta rule, a tail of tokens and one of a long filter: the others are
# the same scan with another decay, or a shorter tail.
KINDS = [case for case in CARRYING if case[0] in ("linear", "gated_delta", "short_conv", "hyena")]
KINDS = [case for case in KINDS if case[2] == "zigzag"]


@pytest.mark.parametrize(
    ("name", "method", "policy", "size"),
    [case if case in KINDS else pytest.param(*case, marks=pytest.mark.full) for case in CARRYING],
    ids=lambda x: str(x),
)
def test_states_and_tails_that_go_on_are_those_of_one_device(name, method, policy, size):
    found = [max(each) for each in zip(*ranks(size, carried, name, method, policy))]
    for worst, (dtype, bound) in zip(found, EXACT.items()):
        assert worst < bound, f"{worst} in {dtype}"
