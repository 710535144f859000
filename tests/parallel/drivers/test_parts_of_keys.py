"""Keys that travel in parts: exact, and each part on its way before the one at hand is computed.

Parts of a few tokens are forced here; rows of tests are otherwise too short for more than one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

import pytest
import torch

from models.attention.full import CAUSAL
from models.kernels import blockwise
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from parallel import key_parts
from parallel.collectives import Communicator
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_ring import Ring
from parallel.layout import contiguous, zigzag
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks

DRIVERS = {"ring": Ring, "allgather": AllGather}
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}
# Of 60 tokens on three ranks the last ones have none but padding.
LENGTHS = [[13, 1, 19], [3, 30, 1, 1]]
ONE_ROW = [[60]]
TOKENS = 60
# Fewest tokens of a part: three to four parts of the 20 tokens of a rank, more of what is fetched.
LEAST = {"ring": 5, "allgather": 4}


class Recorder(Communicator):
    """Writes down what is sent, and what is computed in between."""

    def __init__(self, group):
        super().__init__(group)
        self.events: list[str] = []

    def ring_shift(self, tensors, name="rotate"):
        self.events.append(name)
        return super().ring_shift(tensors, name)

    def start_all_to_all(self, parts, sizes, name="exchange"):
        self.events.append(name)
        return super().start_all_to_all(parts, sizes, name)


@contextmanager
def parts_of(tokens: int, events: list[str]) -> Iterator[None]:
    """Parts have at least so many tokens; what is computed is among the events."""
    least = key_parts.PART_TOKENS["cpu"], key_parts.PART_BYTES["cpu"]
    passes = blockwise.forward, blockwise.backward

    def noted(compute):
        def call(*args, **kwargs):
            events.append("compute")
            return compute(*args, **kwargs)

        return call

    key_parts.PART_TOKENS["cpu"] = tokens
    key_parts.PART_BYTES["cpu"] = 1
    blockwise.forward, blockwise.backward = map(noted, passes)
    try:
        yield
    finally:
        key_parts.PART_TOKENS["cpu"], key_parts.PART_BYTES["cpu"] = least
        blockwise.forward, blockwise.backward = passes


def inputs(rows):
    """q, k, v of all rows, grouped heads, and the weight of the output."""
    generator = torch.Generator().manual_seed(3)
    shapes = (4, 5), (2, 5), (2, 3), (4, 3)
    return [
        torch.randn(rows, TOKENS, *each, generator=generator, dtype=torch.float64)
        for each in shapes
    ]


def run(attention, span, tensors):
    """Output and the gradients of q, k and v."""
    *tokens, weight = tensors
    query, key, value = (tensor.clone().requires_grad_() for tensor in tokens)
    output = attention((query,), (key, value), span=span)
    valid = span.valid()[..., None, None]
    (torch.where(valid, output, 0) * weight).sum().backward()
    return output.detach() * valid, query.grad, key.grad, value.grad


def compare(env, driver, layout, mask, lengths):
    """(worst relative difference, events) of one pass on this rank."""
    whole = packed(lengths, TOKENS)
    tensors = inputs(len(lengths))
    here = shard_span(whole, [LAYOUTS[layout](TOKENS, env.size)], env.rank)
    shard = here.sharding.shard
    communicator = Recorder(env.group)
    wanted = run(Softmax(mask), whole, tensors)
    with parts_of(LEAST[driver], communicator.events):
        attention = DRIVERS[driver](Softmax(mask), communicator)
        found = run(attention, here, [shard(tensor, 0) for tensor in tensors])
    differences = [relative(a, shard(b, 0)) for a, b in zip(found, wanted)]
    return max(differences), communicator.events


def empty(env):
    """Whether this rank holds padding alone."""
    whole = packed(LENGTHS, TOKENS)
    return not shard_span(whole, [contiguous(TOKENS, env.size)], env.rank).valid().any()


@pytest.mark.parametrize("mask", [CAUSAL, CAUSAL & SlidingWindow(9)], ids=["causal", "window"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("driver", DRIVERS)
def test_parts_are_invisible(driver, layout, mask):
    for difference, events in ranks(3, compare, driver, layout, mask, LENGTHS):
        assert difference < 1e-11
        # Of a window little is fetched; keys and values are an exchange each.
        assert events.count(driver) >= (2 if mask != CAUSAL else 4)


def test_a_rank_of_padding_is_among_them():
    assert ranks(3, empty) == [False, False, True]


def told(events):
    return [f"{len([*same])} {event}" for event, same in groupby(events)]


def test_a_ring_sends_before_it_computes():
    """3 ranks, 4 parts of 5 tokens. In backward the later half of a rank's own keys comes first."""
    hop = ["1 ring", "1 compute"]
    forward = ["4 ring", "2 compute", *hop * 3, "1 ring", "5 compute"]
    differentiated = ["1 ring backward", "1 compute", "1 ring gradients"]
    home = ["1 compute", "1 ring gradients"]
    backward = ["4 ring backward", "1 compute", *differentiated * 4, *home * 4, "1 compute"]
    for _, events in ranks(3, compare, "ring", "zigzag", CAUSAL, ONE_ROW):
        after = events.index("ring backward")
        assert told(events[:after]) == forward
        assert told(events[after:]) == backward


def test_an_all_gather_fetches_before_it_computes():
    """Keys and values are two exchanges; two parts are in flight while one is computed."""
    for _, events in ranks(3, compare, "allgather", "zigzag", CAUSAL, ONE_ROW):
        forward = events[: events.index("fetch backward")]
        parts = forward.count("allgather") // 2
        assert parts > 2
        steady = ["2 allgather", "1 compute"] * (parts - 3)
        assert told(forward) == ["4 allgather", "2 compute", *steady, "2 allgather", "3 compute"]
        backward = events[len(forward) :]
        steady = ["2 fetch backward", "1 compute", "2 fetch gradients"] * (parts - 2)
        last = ["1 compute", "2 fetch gradients"] * 2
        assert told(backward) == ["4 fetch backward", "1 compute", *steady, *last, "1 compute"]


@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "device", "parts"),
    [
        (2, 1024, 2, "cpu", 1),  # of 512 keys a message would be 512 KiB
        (2, 1024, 4, "cpu", 2),
        (1, 2048, 8, "cpu", 4),
        (1, 1023, 8, "cpu", 1),
        (1, 8192, 8, "cpu", 4),
        (1, 8192, 1, "meta", 2),
        (0, 8192, 1, "cpu", 1),
    ],
)
def test_a_part_has_enough_keys_and_bytes_to_be_worth_a_message(rows, tokens, heads, device, parts):
    payload = [torch.empty(rows, tokens, heads, 32, device=device) for _ in range(2)]
    found = key_parts.key_parts(payload)
    assert len(found) == parts
    assert found[0].start == 0 and found[-1].stop == tokens
