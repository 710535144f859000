"""A Relay whose rows lie over ranks gives what it gives on one device; the wavefront sends states
and nothing else."""

from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from models.init import initialise
from parallel.context_parallel import apply_context_parallel
from parallel.drivers.sequential import bubble
from parallel.layout import POLICIES, layouts
from parallel.sharding import shard_span
from tests.support.parity import EXACT, packed, relative
from tests.support.pool import ranks
from tests.support.recurrent_scan import Lstm, Summing

WIDTH, HIDDEN = 5, 6
ROWS = [
    [13, 1, 24, 9],
    [3, 40, 1, 1],
    [51],
    [1],
    [20, 20],
]  # uneven documents, one of a single token, mostly padding


def build(kind: str, **settings):
    made = {
        "lstm": lambda: Lstm(WIDTH, HIDDEN, **settings),
        "summing": lambda: Summing(WIDTH, **settings),
    }
    return initialise(made[kind](), seed=1)


def inputs(dtype, span, hidden):
    generator = torch.Generator().manual_seed(2)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state = [noise(span.shape[0], hidden) for _ in range(2 if hidden == HIDDEN else 1)]
    weight = noise(*span.shape, hidden) * span.valid()[..., None]
    return noise(*span.shape, WIDTH), state, weight, [noise(span.shape[0], hidden) for _ in state]


def results(model, span, given, move, counts, again: bool = False):
    """Outputs, last state, and gradients of x, the first state and the parameters; the loss is of
    what `counts`."""
    x, state, weight, ends = given
    x, state = move(x).clone().requires_grad_(), tuple(s.clone().requires_grad_() for s in state)
    y, last = (
        checkpoint(model, x, span, state, use_reentrant=False) if again else model(x, span, state)
    )
    loss = (y * move(weight)).sum() if "y" in counts else 0
    if "last" in counts:
        loss = loss + sum((s * e).sum() for s, e in zip(last, ends))
    loss.backward()
    grads = {f"d {name}": p.grad for name, p in model.named_parameters()}
    return (
        {"y": y.detach(), "d x": x.grad},
        {f"last {i}": s.detach() for i, s in enumerate(last)},
        {
            **grads,
            **{f"d state {i}": s.grad for i, s in enumerate(state)},
        },
    )


def compare(env, kind, settings, policy, rows, dtype, counts=("y", "last"), again=False):
    """Worst relative difference of all outputs and gradients."""
    span = packed(rows)
    given = inputs(dtype, span, HIDDEN if kind == "lstm" else WIDTH)
    want, want_last, want_grads = results(
        build(kind, **settings).to(dtype), span, given, lambda t: t, counts
    )
    many = build(kind, **settings).to(dtype)
    names = list(many.state_dict())
    communicator = apply_context_parallel(many, env.group)
    assert list(many.state_dict()) == names
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard, valid = here.sharding.shard, here.valid()[..., None]
    given[3][:] = [
        e / env.size for e in given[3]
    ]  # every rank has the last state: its loss must be counted once
    got, got_last, got_grads = results(many, here, given, lambda t: shard(t, 0), counts, again)
    worst = {key: relative(got[key] * valid, shard(want[key], 0) * valid) for key in want}
    worst |= {key: relative(got_last[key], want_last[key]) for key in want_last}
    for key, grad in got_grads.items():
        assert grad is not None, f"{key} has no gradient on rank {env.rank}"
        dist.all_reduce(grad, group=env.group)
        worst[key] = relative(grad, want_grads[key])
    note = communicator.choices.pop("relay")
    assert note.startswith(f"wavefront over {env.size} ranks, ")
    return max(worst.values()), worst


SETTINGS = {
    "lstm": ("lstm", {}),
    "lstm in twos": ("lstm", {"rows": 2}),
    "lstm in pieces": ("lstm", {"size": 5, "depth": 2}),
    "lstm in few pieces": (
        "lstm",
        {"size": 30},
    ),  # fewer pieces than ranks: the last ranks hand on what they got
    "summing": ("summing", {"size": 6}),
    "summing documents": ("summing", {}),
    "summing cut": ("summing", {"size": 3, "depth": 1}),
    "summing cut by threes": ("summing", {"size": 3, "depth": 3}),
}


EVERY = list(product(SETTINGS, POLICIES, (2, 3, 4)))
COVERING = [
    (name, list(POLICIES)[(i + size) % 3], size)
    for i, name in enumerate(SETTINGS)
    for size in (2, 3, 4)
]


@pytest.mark.parametrize("name, policy, size", COVERING)
def test_a_wavefront_is_invisible(name, policy, size):
    check(name, policy, size)


@pytest.mark.full
@pytest.mark.parametrize("name, policy, size", [case for case in EVERY if case not in COVERING])
def test_every_wavefront_is_invisible(name, policy, size):
    check(name, policy, size)


def check(name, policy, size):
    for dtype in EXACT:
        found = ranks(size, compare, *SETTINGS[name], policy, ROWS, dtype)
        assert max(worst for worst, _ in found) < EXACT[dtype], found


@pytest.mark.parametrize("kind", ["lstm", "summing"])
def test_it_is_invisible_with_one_row_and_where_the_last_state_is_not_used(kind):
    for rows in ([[13, 1, 24, 9]], ROWS):
        found = ranks(3, compare, kind, {"size": 4}, "zigzag", rows, torch.float64, ("y",))
        assert max(worst for worst, _ in found) < 1e-11, found


@pytest.mark.parametrize("counts", [("y", "last"), ("y",), ("last",)])
def test_it_may_be_computed_again_in_backward(counts):
    found = ranks(4, compare, "lstm", {"size": 4}, "zigzag", ROWS, torch.float64, counts, True)
    assert max(worst for worst, _ in found) < 1e-11, found


def test_the_bubble_is_the_part_of_the_ticks_that_the_wave_comes_in_and_runs_out():
    for size, groups in ((1, 3), (4, 1), (4, 4), (3, 30)):
        ticks = groups + size - 1
        busy = [
            [b for b in range(groups) if size > rank and rank + b < ticks] for rank in range(size)
        ]
        assert bubble(size, groups) == pytest.approx(1 - sum(map(len, busy)) / (ticks * size))


def traffic(env, tokens):
    span = packed([[tokens]] * 3, tokens)
    model, x = build("lstm").double(), torch.ones(3, tokens, WIDTH, dtype=torch.float64)
    communicator = apply_context_parallel(model, env.group)
    here = shard_span(span, layouts("contiguous", span, env.size), env.rank)
    y, _ = model(here.sharding.shard(x, 0), here)
    y.sum().backward()
    return communicator.bytes_sent, communicator.choices


def test_what_is_handed_on_is_a_state_a_row_whatever_the_length():
    state = 3 * 2 * HIDDEN * 8
    for tokens in (12, 120):
        found = ranks(3, traffic, tokens)
        assert [sent.get("state", 0) for sent, _ in found] == [state, state, 0]
        assert [sent.get("state backward", 0) for sent, _ in found] == [0, state, state]
        assert [sent["last state"] for sent, _ in found] == [0, 0, 2 * state]
        assert all(
            sent["relay"] == sent["relay home"] == 0 for sent, _ in found
        )  # a contiguous layout lies right
        assert found[0][1] == {"relay": "wavefront over 3 ranks, 3 groups of rows: bubble 40%"}


def kept(env, shared):
    """Numbers that backward keeps on this rank, for a row of 12 pieces."""
    span, model, saved = packed([[48]], 48), build("summing", size=4).double(), 0
    if shared:
        apply_context_parallel(model, env.group)
        span = shard_span(span, layouts("zigzag", span, env.size), env.rank)
    x = torch.ones(*span.shape, WIDTH, dtype=torch.float64, requires_grad=True)

    def note(t):
        nonlocal saved
        saved += t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(x, span)
    return saved


def test_a_rank_keeps_its_stretch_alone():
    whole = ranks(3, kept, False)[0]
    assert max(ranks(3, kept, True)) < 0.4 * whole
