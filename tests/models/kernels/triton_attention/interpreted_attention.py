"""The Triton kernels against the reference kernel in float64: forward, lse and all gradients, with
the keys in two parts and the lse of both from outside.

Run by test_interpreted.py in Triton's interpreter on the CPU, and by scripts/gpu_check.sh on a
card. Blocks of 16 let short rows have several.
"""

# pyright: reportAttributeAccessIssue=false

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings

from models.kernels import backends, blockwise, reference
from models.kernels.triton_attention import dispatch, launch
from models.kernels.triton_attention.arguments import Addresses, Bias, How
from models.kernels.triton_attention.pairs import pairs_of, seen_pairs
from models.kernels.triton_attention.programs import token_table, translate
from models.kernels.triton_attention.sizes import BlockConfig
from models.masks.algebra import Mask, visible
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.masks.roles import GlobalKey, GlobalQuery, PrefixTokens
from models.masks.segments import STALE, SegmentRecurrence
from models.masks.sparse import DilatedWindow, NeighborBlocks, RandomBlocks
from models.positions.alibi import AlibiScore
from models.positions.t5 import T5Score, edges
from models.primitives.softmax import Softmax
from models.scores import Score, SoftcapScore
from models.span import GLOBAL, PREFIX, READ, TEXT, Span
from tests.models.masks.test_algebra import ROWS, row
from tests.support.parity import packed
from tests.support.random_masks import ALL_MASKS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DOCUMENTS = Causal() & SameDocument()
BIG_BIRD = (
    NeighborBlocks(3, 1)
    | RandomBlocks(3, 1, 1, 2, seed=1, layer=0, patterns=2, both=True)
    | GlobalKey(first=2, every=9)
    | GlobalQuery(first=2)
)
ROLES = torch.tensor([[TEXT, PREFIX, READ, STALE, GLOBAL] * 5] * 2)
CASES = {
    "ALiBi": (DOCUMENTS, AlibiScore(2)),
    "window, sinks, soft cap": (
        DOCUMENTS & (SlidingWindow(3) | FirstTokens(1)),
        SoftcapScore(Score(), 2.0),
    ),
    "T5": (DOCUMENTS, T5Score(edges(6, 9), False, None)),
    "T5 both ways, soft cap": (SameDocument(), SoftcapScore(T5Score(edges(3, 5), True, 1.0), 1.5)),
    "prefix, chunks": (PrefixTokens() | (Causal() & SameChunk(4)), Score(0.4)),
    "BigBird": (SameDocument() & BIG_BIRD, Score()),
    "dilated by head": (Causal() & DilatedWindow(3, (1, 2)), Score()),
    "drawn by head, ALiBi": (
        DOCUMENTS
        & (RandomBlocks(2, 0, 1, 2, seed=3, layer=1, patterns=2) | DilatedWindow(2, (2, 1))),
        AlibiScore(2),
    ),
    "segments": (Causal() & SegmentRecurrence(4, 3), Score()),
    "nothing": (~Mask(), AlibiScore(2)),
}
BOUNDS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(launch, "_size", lambda *about: BlockConfig(16, 16, 4, 1))


def two_rows() -> Span:
    """Uneven documents, padding in the middle and at the end, and tokens of every role."""
    span = packed([[9, 1, 13], [3, 18]], 25)
    span.doc[1, 5] = -1
    return Span(span.pos, span.doc, ROLES).map(lambda x: x.to(DEVICE))


def tensors(dtype, heads=2, groups=1, width=12, value=20, params=()):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, width), (groups, width), (groups, value), (heads, value)
    some = [torch.randn(2, 25, *shape, generator=generator) for shape in shapes]
    some += [torch.randn(shape, generator=generator) for shape in params]
    return [x.to(dtype).to(DEVICE) for x in some]


def params_of(score) -> list:
    inner = score.inner if isinstance(score, SoftcapScore) else score
    if not isinstance(inner, T5Score):
        return []
    return [((1 + inner.bidirectional) * (len(inner.starts) + 1), 2)]


def close(got, want, bound):
    got = got.detach()
    want = want.detach()
    assert torch.equal(got.isinf(), want.isinf()) and not got.isnan().any()
    finite = want.isfinite()
    scale = max([1.0, *want[finite].abs().flatten().tolist()])
    assert ((got.double() - want)[finite].abs() <= bound * scale).all()


def truth(mask, score, span, q, k, v, d_out, params):
    """(mean, lse, delta, gradients) in float64."""
    q, k, v, d_out, *params = (x.double() for x in (q, k, v, d_out, *params))
    heads = torch.arange(q.shape[2], device=q.device)
    about = score, mask, (q,), (k, v), params, span, span, heads
    mean, lse = reference.forward(*about)
    delta = (d_out * mean).sum(-1)
    return mean, lse, delta, reference.backward(*about, d_out=d_out, lse=lse, delta=delta)


def check(mask, score, dtype=torch.float32, span=None, **sizes):
    """Keys in two parts, an uneven cut; into sums that hold something already."""
    q, k, v, d_out, *params = tensors(dtype, params=params_of(score), **sizes)
    span = span or two_rows()
    mean, lse, delta, want = truth(mask, score, span, q, k, v, d_out, params)
    heads = torch.arange(q.shape[2], device=DEVICE)
    parts = [slice(0, 11), slice(11, 25)]
    program, terms = dispatch.translated(mask, score) or (None, None)
    assert program and terms
    wide = torch.float32
    total = torch.zeros_like(mean, dtype=wide), torch.full_like(lse, -torch.inf, dtype=wide)
    sums = [torch.ones_like(x, dtype=wide) for x in (q, k, v)]
    d_params = [torch.ones_like(x, dtype=wide) for x in params]
    for part in parts:
        keys = Span(*(x[:, part] for x in span.addresses()))
        work = dispatch.PairwiseAttention(launch, mask, program, terms, heads, params, span, keys)
        operands = q, k[:, part], v[:, part]
        launch.forward(work, operands, score.scale(q), total)
        numbers = launch.backward(
            work, operands, [sums[0], sums[1][:, part], sums[2][:, part]], score.scale(q),
            d_out=d_out.float(), lse=lse.to(wide), delta=delta.to(wide),
        )  # fmt: skip
        if numbers is not None:
            dispatch.add_table_gradient(terms, numbers, d_params)
    grown = [right + 1 for right in want if right is not None]  # the sums held ones
    for got, right in zip((*total, *sums, *d_params), (mean, lse, *grown), strict=True):
        close(got, right, BOUNDS[dtype])


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_answers_as_the_reference(name):
    check(*CASES[name])


# The interpreter multiplies bfloat16 as if it were whole numbers.
HALF = [torch.float16, *[torch.bfloat16] * torch.cuda.is_available()]


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_and_grouped_heads(dtype):
    check(DOCUMENTS, AlibiScore(4), dtype, heads=4, groups=2)


def test_what_lies_beyond_the_keys_counts_for_nothing():
    """No padding and a mask that hides nothing: blocks of keys that are cut short need it still."""
    line = Span.line(2, 25).map(lambda x: x.to(DEVICE))
    check(Mask(), SoftcapScore(T5Score(edges(3, 5), True, 1.0), 1.5), span=line)


def test_values_as_wide_as_a_block_and_keys_wider():
    check(PrefixTokens() | DOCUMENTS, Score(), width=24, value=16)


@triton.jit
def seen_kernel(out, queries, keys, bias, HOW: tl.constexpr):
    SIDE: tl.constexpr = HOW.side_q
    head = tl.program_id(0)
    tokens = tl.arange(0, SIDE)
    pairs = pairs_of(queries, keys, bias, 0, head, HOW)
    if HOW.capped:
        seen = tl.trans(seen_pairs(pairs, tokens, tokens, HOW.code, True))
    else:
        seen = seen_pairs(pairs, tokens, tokens, HOW.code, False)
    place = head * SIDE * SIDE + tokens[:, None] * SIDE + tokens[None, :]
    tl.store(out + place, seen.to(tl.int8))


@given(ALL_MASKS, ROWS, ROWS)
@settings(max_examples=150, deadline=None)
def test_a_program_shows_what_the_mask_shows(mask, queries, keys):
    query, key = (row(runs).map(lambda x: x.to(DEVICE)) for runs in (queries, keys))
    program = translate(mask)
    assert program is not None
    heads = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    tables = token_table(program, query, keys=False), token_table(program, key, keys=True)
    sides = [Addresses(x, x.shape[1], x.shape[2]) for x in tables]
    kernel: Any = seen_kernel
    zero = torch.zeros(1, device=DEVICE)
    want = visible(mask, query, key, heads.long())[0].expand(2, -1, -1)
    for flipped in (False, True):
        out = torch.zeros(2, 64, 64, dtype=torch.int8, device=DEVICE)
        how = How(program.code, 0, flipped, "ieee", 1, 1, 16, 16, 64, 64)
        kernel[(2,)](out, *sides, Bias(heads, zero, 0, 1, 1.0, 0.0), HOW=how)
        assert torch.equal(out[:, : query.shape[1], : key.shape[1]].bool(), want)
        assert out.sum() == want.sum()


@pytest.mark.parametrize("general", [False, True])
def test_an_attention_of_the_gpu_goes_to_the_kernels(monkeypatch, general):
    """By the dispatch of blockwise.py; the gradient of the lse is used where `general`."""
    monkeypatch.setattr(backends, "PAIRWISE", dispatch.PAIRWISE | {("cpu", torch.float32)})
    monkeypatch.setattr(dispatch, "PAIRWISE", backends.PAIRWISE)
    called = []
    for name in ("forward", "backward"):
        plain = getattr(launch, name)
        monkeypatch.setattr(
            launch, name, lambda *a, _n=name, _p=plain, **k: (called.append(_n), _p(*a, **k))[1]
        )
    score = SoftcapScore(T5Score(edges(6, 9), False, None), 3.0)
    some = tensors(torch.float32, groups=2, params=params_of(score))
    span = two_rows()

    def answer(dtype):
        q, k, v, d_out, table = (x.to(dtype).requires_grad_() for x in some)
        mix = Softmax(DOCUMENTS, score)
        mean, lse = mix.partial((q,), (k, v), (table,), span=span.fresh(), lse=general)
        total = (mean * d_out).sum()
        if general:
            total = total + lse[lse.isfinite()].sin().sum()
        return mean, lse, *torch.autograd.grad(total, (q, k, v, table))

    for got, right in zip(answer(torch.float32), answer(torch.float64), strict=True):
        close(got, right, 2e-5)
    assert called == ["forward", "backward"]
    assert blockwise.pairwise is dispatch
