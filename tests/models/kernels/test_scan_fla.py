"""Scans by kernels that take whole stretches: what is handed over and what is made of the answers,
against our own scan.

The table's kernels need a GPU. Here a recurrence in float64 stands in for them, called as they are
called; that they answer as it does is shown in tests/peers/test_fla_kernels.py by the kernels
themselves.
"""

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.kernels import scan_fla
from models.kernels.scan_fla import (
    BEFORE,
    CHANNEL,
    LOW_RANK,
    PLAIN,
    STRONGEST,
    FlaScan,
    load_kernel,
    scan_kind,
    select_kernel,
)
from models.kernels.varlen import varlen_layout
from models.primitives.scan import Scan
from models.span import Span
from tests.models.primitives.test_scan import both, holes
from tests.support.parity import relative
from tests.support.scan_inputs import KINDS, inputs

GPUS = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
RUNS = [[5, 0, 30, 25], [1, 21, 8, 30]]
EXPECTED = {PLAIN: {"g"}, CHANNEL: {"g"}, BEFORE: {"w", "u"}, LOW_RANK: set()}


def stand_in(kind):
    """A recurrence with the signature of the kernel of a kind, which checks what it is handed."""

    def kernel(q, k, v, *low, scale, initial_state, output_final_state, cu_seqlens, **gate):
        assert scale == 1.0 and output_final_state is True and set(gate) == EXPECTED[kind]
        tokens, heads, keys = q.shape[1:]
        log = low[-1] if low else gate["w" if kind == BEFORE else "g"]
        assert q.shape == k.shape == (1, tokens, heads, keys) and v.shape[:3] == q.shape[:3]
        assert log.shape == (q.shape[:3] if kind == PLAIN else q.shape) and len(low) == (
            3 if kind == LOW_RANK else 0
        )
        assert cu_seqlens.dtype == torch.int64 and cu_seqlens[0] == 0 and cu_seqlens[-1] == tokens
        assert (cu_seqlens.diff() > 0).all() and initial_state.shape == (
            len(cu_seqlens) - 1,
            heads,
            keys,
            v.shape[3],
        )
        assert all(x.is_contiguous() for x in (q, k, v, *low, log, initial_state))
        outs, lasts = [], []
        for state, start, stop in zip(
            initial_state, cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()
        ):
            payload = [x[:, start:stop] for x in (k, v, log, *low[:2])]
            span = Span.of(
                torch.arange(1, stop - start + 1)[None],
                torch.zeros(1, stop - start, dtype=torch.long),
            )  # opens nowhere
            out, last = Scan(before=kind == BEFORE).recur(
                (q[:, start:stop],), payload, span=span, state=state[None]
            )
            outs.append(out)
            lasts.append(last)
        return torch.cat(outs, 1), torch.cat(lasts)

    return kernel


def whole(query, payload, span, before=False, runs=None):
    kind = scan_kind(payload, before)
    assert kind
    return FlaScan(kind, stand_in(kind), query[0], payload, varlen_layout(span, runs))


CASES = [*((kind, False) for kind in KINDS), ("vector", True)]


@pytest.mark.parametrize("kind, before", CASES)
def test_a_scan_by_stretches_equals_our_own(kind, before):
    span, leaf = holes(), Scan(chunk=4, before=before)
    query, payload = inputs(kind, span)

    def through(q, p):
        work = whole(q, p, span, before)
        return work.read(work.blank())

    want = both(lambda q, p: leaf(q, p, span=span), query, payload)
    assert max(map(relative, both(through, query, payload), want)) < 1e-11


def test_heads_may_share_queries_keys_and_decays():
    span, leaf = holes(), Scan(chunk=4)
    query, payload = inputs("scalar", span)
    few = (
        [x[:, :, :1] for x in query],
        [x if i == 1 else x[:, :, :1] for i, x in enumerate(payload)],
    )
    want = both(lambda q, p: leaf(q, p, span=span), *few)
    assert (
        max(map(relative, both(lambda q, p: (w := whole(q, p, span)).read(w.blank()), *few), want))
        < 1e-11
    )
    keep, _, _ = whole(*few, span, runs=RUNS).summarise()
    assert relative(keep, leaf.open(*few, span=span, runs=RUNS).summarise().keep) < 1e-11


@pytest.mark.parametrize("kind, before", CASES)
def test_runs_are_summed_up_and_left_as_our_own_do(kind, before):
    span, leaf = holes(), Scan(chunk=4, before=before)
    query, payload = inputs(kind, span)
    states = torch.randn(
        2, 4, 2, 4, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )

    def told(work):
        keep, gain, opened = work.summarise()
        assert torch.equal(
            opened, leaf.open(query, payload, span=span, runs=RUNS).summarise().opened
        )
        return torch.cat(
            [x.flatten() for x in (keep, gain, work.read(states), work.final_states(states))]
        )

    ours = both(lambda q, p: told(leaf.open(q, p, span=span, runs=RUNS)), query, payload)
    theirs = both(lambda q, p: told(whole(q, p, span, before, RUNS)), query, payload)
    assert max(map(relative, theirs, ours)) < 1e-11


def test_a_state_that_comes_in_gets_its_gradient():
    span, leaf = holes(), Scan(chunk=4)
    query, payload = inputs("vector delta", span)
    grads = []
    for work in (
        leaf.open(query, payload, span=span, runs=RUNS),
        whole(query, payload, span, runs=RUNS),
    ):
        states = torch.ones(2, 4, 2, 4, 5, dtype=torch.float64, requires_grad=True)
        (work.read(states).square().sum() + work.final_states(states).square().sum()).backward()
        grads.append(states.grad)
    assert relative(grads[1], grads[0]) < 1e-11


def test_decay_that_forgets_all_reaches_a_kernel_as_a_number():
    span, leaf = Span.line(1, 24), Scan(chunk=8)
    query, payload = inputs("scalar", span)
    payload[2][:, 9] = -math.inf
    work = whole(query, payload, span)
    assert work.tensors[3].min() == STRONGEST
    assert relative(work.read(work.blank()), leaf(query, payload, span=span)) < 1e-11


def test_a_rank_of_padding_has_the_same_graph_as_the_others():
    span = Span.of(torch.zeros(1, 6, dtype=torch.long), torch.full((1, 6), -1))
    query, payload = inputs("scalar delta", span)
    leaves = [x.requires_grad_() for x in (*query, *payload)]
    work = whole(leaves[:1], leaves[1:], span)
    states = torch.ones(1, 1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    out = work.read(states)
    assert out.shape == (1, 6, 2, 5) and not out.any()
    assert torch.equal(work.final_states(states), states)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (*leaves, states))


def on_gpu(dtype, width=64, dims=4) -> Any:
    """What `pick` reads of a tensor, as if it lay on a GPU."""
    return SimpleNamespace(
        device=torch.device("cuda", 0), dtype=dtype, shape=(1, 8, 2, width), dim=lambda: dims
    )


def test_who_serves_what(monkeypatch):
    monkeypatch.setattr(scan_fla, "load_kernel", lambda kind: kind)
    monkeypatch.setattr(torch.version, "hip", None)

    def served(dtype, dims=3, low=False, before=False, width=64):
        x = on_gpu(dtype, width)
        return select_kernel(
            [x], [x, x, on_gpu(dtype, width, dims), *([x, x] if low else [])], before=before
        )

    half = torch.bfloat16
    assert served(half) == (PLAIN, PLAIN) and served(half, 4) == (CHANNEL, CHANNEL)
    assert served(half, 4, before=True) == (BEFORE, BEFORE) and served(half, 3, low=True) == (
        LOW_RANK,
        LOW_RANK,
    )
    assert served(half, 3, before=True) is None and served(half, 4, low=True, before=True) is None
    assert served(torch.float64) is None and served(half, width=257) is None
    assert served(torch.float32) is None
    torch.set_float32_matmul_precision("high")
    try:
        assert served(torch.float32) == (PLAIN, PLAIN)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (
        select_kernel([torch.ones(1, 8, 2, 4)], [torch.ones(1, 8, 2, 4)] * 3, before=False) is None
    ), "that is on the CPU"


def test_a_package_that_fails_to_import_is_reported_once_and_torch_serves(monkeypatch):
    def broken(name):
        raise AttributeError("made for another triton")

    load_kernel.cache_clear()
    monkeypatch.setattr(scan_fla.importlib, "import_module", broken)
    try:
        with pytest.warns(UserWarning, match="made for another triton.*torch serves"):
            assert load_kernel(PLAIN) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_kernel(PLAIN) is None
    finally:
        load_kernel.cache_clear()


def test_a_package_that_is_not_there_is_no_fault(monkeypatch):
    load_kernel.cache_clear()
    monkeypatch.setitem(scan_fla.TABLE, PLAIN, ("fla_that_is_nowhere.ops", "chunk"))
    monkeypatch.setattr(scan_fla, "PACKAGE", "fla_that_is_nowhere")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_kernel(PLAIN) is None
    finally:
        load_kernel.cache_clear()


if GPUS:  # where there are none there is nothing to skip

    @pytest.mark.every_case
    @pytest.mark.parametrize("gpu", GPUS)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    @pytest.mark.parametrize("kind, before", CASES)
    def test_on_a_gpu_the_kernel_serves_and_answers_as_our_own_scan(kind, before, dtype, gpu):
        """Half: its rounding inside a chunk; float32: products in TF32, 10 bits. Decays stay
        float32."""
        span, leaf = holes(), Scan(before=before)
        query, payload = inputs(kind, span, keys=32, values=48, strength=0.3)
        exact = [x if i == 3 else x.to(dtype).double() for i, x in enumerate((*query, *payload))]
        want = both(lambda q, p: leaf(q, p, span=span), exact[:1], exact[1:])
        there = span.map(lambda x: x.to(gpu))
        given = [x.to(gpu, torch.float32 if i == 3 else dtype) for i, x in enumerate(exact)]
        torch.set_float32_matmul_precision("high")
        try:
            assert isinstance(leaf.open(given[:1], given[1:], span=there), FlaScan)
            got = both(lambda q, p: leaf(q, p, span=there), given[:1], given[1:])
        finally:
            torch.set_float32_matmul_precision("highest")
        bound = 4e-2 if dtype == torch.bfloat16 else 5e-3
        assert max(relative(a.cpu().double(), b) for a, b in zip(got, want, strict=True)) < bound
