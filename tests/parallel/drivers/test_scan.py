"""Leaves of the linear-time family, cut over ranks, equal themselves on one device; bytes follow
the formulas."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from models.primitives.causal_conv import CausalConv
from models.primitives.long_conv import LongConv
from models.primitives.scan import Scan
from parallel.collectives import Communicator
from parallel.drivers.causal_conv import Halo
from parallel.drivers.long_conv import ChannelAllToAll
from parallel.drivers.long_conv_ring import RingLongConv
from parallel.drivers.scan import StatePassing
from parallel.layout import Layout, contiguous, zigzag
from parallel.partition import unit_ranges
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks
from tests.support.scan_inputs import KINDS, inputs

TOKENS = 51


def scattered(tokens: int, size: int) -> Layout:
    """Uneven runs, one empty, those of a rank not in order: what a balancer may come up with."""
    each = -(-tokens // size)
    if size == 2:
        return Layout((((30, 2 * each), (0, 30 - each)), ((30 - each, 30), (9, 9))), tokens)
    runs = [
        [(r * each + 5, (r + 1) * each), (((r + 1) % size) * each, ((r + 1) % size) * each + 5)]
        for r in range(size)
    ]
    return Layout(tuple(map(tuple, runs)), tokens)


def layouts(name: str, size: int) -> list[Layout]:
    table = {"contiguous": contiguous, "zigzag": zigzag, "scattered": scattered}
    if name == "by row":
        return [scattered(TOKENS, size), Layout(contiguous(TOKENS, size).runs, TOKENS)]
    return [table[name](TOKENS, size)]


def case(kind: str):
    """(leaf, driver, per-token tensors, params, how to call either with them)."""
    inner_span = packed()
    generator = torch.Generator().manual_seed(5)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind in KINDS:
        query, payload = inputs(kind, inner_span)
        return (
            Scan(chunk=4),
            StatePassing,
            [*query, *payload],
            [],
            lambda leaf, x, p, span: leaf(x[:1], x[1:], span=span),
        )
    if kind.startswith("window"):
        taps = noise(int(kind.split()[1]), 3)
        return (
            CausalConv(),
            Halo,
            [noise(*inner_span.shape, 3)],
            [taps],
            lambda leaf, x, p, span: leaf(x, p, span=span),
        )
    driver = {
        "channels": ChannelAllToAll,
        "few channels": ChannelAllToAll,
        "toeplitz": RingLongConv,
    }[kind]
    width = 1 if kind == "few channels" else 7
    return (
        LongConv(),
        driver,
        [noise(*inner_span.shape, width)],
        [noise(TOKENS + 3, width)],
        lambda f, x, p, span: f(x, p, span=span),
    )


def like(mask, x):
    """A mask [B, T] with as many dims as x."""
    return mask.view(*mask.shape, *[1] * (x.dim() - 2))


def compare(env, kind: str, layout: str, poison: bool = False) -> float:
    """Worst relative difference over outputs and gradients; `poison`: document 2 against NaN in all
    other tokens."""
    leaf, driver, tokens, params, call = case(kind)
    inner_span = packed()
    healthy = inner_span.doc == 2 if poison else inner_span.valid()
    weight = None

    def run(f, span, move):
        nonlocal weight
        leaves = (
            [move(x).clone().requires_grad_() for x in tokens],
            [p.clone().requires_grad_() for p in params],
        )
        out = call(f, *leaves, span)
        if weight is None:
            weight = torch.randn(
                out.shape, generator=torch.Generator().manual_seed(6), dtype=out.dtype
            ) * like(healthy, out)
        (torch.where(like(move(healthy), out), out, 0) * move(weight)).sum().backward()
        return [out.detach(), *(x.grad for x in leaves[0])], [p.grad for p in leaves[1]]

    want, want_params = run(leaf, inner_span, lambda x: x)
    here = shard_span(inner_span, layouts(layout, env.size), env.rank)
    if poison:
        tokens = [torch.where(like(healthy, x), x, torch.nan) for x in tokens]
    shard = partial(here.sharding.shard, fill=0)
    got, got_params = run(driver(leaf, Communicator(env.group)), here, shard)
    mine = shard(healthy)
    worst = [relative(a[mine], shard(b)[mine]) for a, b in zip(got, want)]
    for a, b in zip(got_params, want_params):
        dist.all_reduce(a, group=env.group)
        worst += (
            [] if poison else [relative(a, b)]
        )  # the gradient of a filter sums over all tokens, NaN among them
    return float(torch.tensor(worst).max())


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "scattered", "by row"])
@pytest.mark.parametrize(
    "kind", [*KINDS, "window 1", "window 4", "window 30", "channels", "few channels", "toeplitz"]
)
def test_a_cut_is_invisible(kind, layout, size):
    assert max(ranks(size, compare, kind, layout)) < 1e-11


@pytest.mark.parametrize("layout", ["zigzag", "scattered"])
@pytest.mark.parametrize("kind", [*KINDS, "window 4", "channels", "toeplitz"])
def test_nan_in_other_documents_and_padding_stays_there(kind, layout):
    assert max(ranks(3, compare, kind, layout, True)) < 1e-11


def sent(env, kind: str, tokens: int) -> dict[str, int]:
    """Bytes that this rank sends, forward and backward, in a zigzag over rows of so many tokens."""
    span = packed([[tokens // 2, tokens // 2]], tokens)
    here = shard_span(span, [zigzag(tokens, env.size)], env.rank)
    communicator = Communicator(env.group)
    if kind == "window 4":
        x = torch.ones(*here.shape, 3, dtype=torch.float64, requires_grad=True)
        out = Halo(CausalConv(), communicator)(
            (x,), (torch.ones(4, 3, dtype=torch.float64),), span=here
        )
    else:
        query, payload = inputs(kind, here)
        out = StatePassing(Scan(), communicator)(
            [x.requires_grad_() for x in query], payload, span=here
        )
        payload[1].requires_grad_()
        out = out + StatePassing(Scan(), communicator)(query, payload, span=here)
    out.sum().backward()
    return communicator.bytes_sent


@pytest.mark.parametrize("kind", ["scalar", "vector", "vector delta"])
def test_bytes_of_a_scan_are_the_formula_and_know_no_length(kind):
    size, heads, keys, values, runs = 3, 2, 4, 5, 2
    kept = {"scalar": 1, "vector": keys, "vector delta": keys * keys}[kind]
    shares = unit_ranges(heads, size)
    for tokens in (48, 480):
        for rank, found in enumerate(ranks(size, sent, kind, tokens)):
            mine = shares[rank][1] - shares[rank][0]
            summary, state = (
                (heads - mine) * runs * (kept + keys * values) * 8,
                mine * (size - 1) * runs * keys * values * 8,
            )
            assert found["summaries"] == 2 * summary and found["states"] == 2 * state
            assert (
                found["summaries backward"] == mine * (size - 1) * runs * (kept + keys * values) * 8
            )
            assert found["states backward"] == (heads - mine) * runs * keys * values * 8


def test_bytes_of_a_window_are_its_reach_for_each_run():
    for tokens in (48, 480):
        found = ranks(
            3, sent, "window 4", tokens
        )  # runs 0 5 | 1 4 | 2 3: one border lies within rank 2
        assert [each["halo"] for each in found] == [3 * 3 * 8 * n for n in (1, 2, 1)]
        assert [each["halo backward"] for each in found] == [3 * 3 * 8 * n for n in (1, 2, 1)]
