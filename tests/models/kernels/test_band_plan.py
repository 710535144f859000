"""Calls for packed sequences hold every visible pair once, few calls do, and they compute what
tiles do."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kernels import blockwise
from models.kernels.band_plan import plan_bands
from models.masks.algebra import Mask, visible
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.primitives.softmax import Softmax
from models.scores import Score
from models.span import Span
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import LENGTHS, packed

MASKS = {
    "causal": Causal() & SameDocument(),
    "sliding": Causal() & SameDocument() & SlidingWindow(5),
    "ahead too": SameDocument() & SlidingWindow(7),
    "documents": SameDocument(),
    "causal without documents": Causal(),
    "everything": Mask(),
}


def sees(call, queries, keys):
    """[queries, keys] bool of one stretch, as kernels for packed sequences define it.

    Those of PyTorch and flash-attn 2 take a bound of as many keys as the longest stretch has, or
    more, for none.
    """
    query = torch.arange(queries)[:, None] + keys - queries
    key = torch.arange(keys)
    seen = torch.ones(queries, keys, dtype=torch.bool)
    if 0 <= call.left < call.longest_key:
        seen &= key >= query - call.left
    if 0 <= call.right < call.longest_key:
        seen &= key <= query + call.right
    return seen


def numbers(tokens):
    return torch.arange(tokens.start, tokens.stop) if isinstance(tokens, slice) else tokens


def stretches(call):
    """(queries, keys) of every stretch, as numbers of tokens of all rows."""
    queries = numbers(call.queries).split(call.query_ends.diff().tolist())
    keys = numbers(call.keys).split(call.key_ends.diff().tolist())
    return list(zip(queries, keys, strict=True))


def rows_of(lengths):
    size = max(map(sum, lengths))
    pos = torch.zeros(len(lengths), size, dtype=torch.long)
    doc = torch.full((len(lengths), size), -1)
    for row, documents in enumerate(lengths):
        start = 0
        for number, length in enumerate(documents):
            pos[row, start : start + length] = torch.arange(length)
            doc[row, start : start + length] = number
            start += length
    return Span.of(pos, doc)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=6), min_size=1, max_size=3),
    mask=st.sampled_from(sorted(MASKS)),
    cut=st.integers(0, 60),
    ranks=st.integers(1, 3),
    share=st.integers(1, 4),
    own=st.booleans(),
)
def test_every_visible_pair_is_computed_once_and_no_other(lengths, mask, cut, ranks, share, own):
    span = rows_of(lengths)
    if ranks > 1:
        shared = layouts("zigzag", span, ranks)
        # A rank's own keys lie in two stretches of the row, as its queries do.
        key_rank = 0 if own else ranks - 1
        queries, keys = (shard_span(span, shared, rank) for rank in (0, key_rank))
    else:
        size = span.shape[1]
        # Keys travel in parts: a part may have fewer tokens than the queries have.
        queries, keys = span.map(lambda t: t[:, cut:]), span.map(lambda t: t[:, : size // share])
    calls = plan_bands(MASKS[mask], queries, keys)
    assert calls is not None
    count = torch.zeros(queries.pos.numel(), keys.pos.numel(), dtype=torch.long)
    for call in calls:
        assert numbers(call.queries).unique().numel() == numbers(call.queries).numel()
        for query, key in stretches(call):
            assert call.longest_query >= len(query) and call.longest_key >= len(key)
            seen = sees(call, len(query), len(key))
            assert seen.any(1).all(), "a kernel may answer NaN to a query that sees nothing"
            count[query[:, None], key] += seen
    rows = queries.shape[0]
    seen = visible(MASKS[mask], queries, keys)[:, 0].expand(-1, queries.shape[1], keys.shape[1])
    count = count.view(rows, queries.shape[1], rows, keys.shape[1])
    assert torch.equal(count[range(rows), :, range(rows)], seen.long())
    assert count.sum() == seen.sum(), "no row sees another"


def test_documents_and_windows_are_one_call_and_long_rows_none():
    span = packed()
    for mask in ("causal", "documents"):
        calls = plan_bands(MASKS[mask], span.fresh(), span)
        assert calls is not None and len(calls) == 1 and len(calls[0].query_ends) == 9
    line = Span.line(1, 4096)
    assert plan_bands(MASKS["causal"], line, line) is None, "one pair of sequences, a triangle"
    calls = plan_bands(Causal() & SlidingWindow(100), line, line)
    assert calls is not None and len(calls) == 1 and (calls[0].left, calls[0].right) == (99, 0)


@pytest.mark.parametrize("mask", [FirstTokens(3) & SameDocument(), SameChunk(4)], ids=str)
def test_a_mask_that_is_no_band_is_left_to_tiles(mask):
    assert plan_bands(mask, packed(), packed()) is None


def stand_in():
    """A kernel for packed sequences in float64, stretch by stretch."""

    def logits(q, k, scale, call):
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("thd,shd->hts", q, k) * scale
        return scores.masked_fill(~sees(call, len(q), len(k)), -torch.inf)

    def parts(call):
        query_ends, key_ends = call.query_ends.tolist(), call.key_ends.tolist()
        for number in range(len(query_ends) - 1):
            yield slice(*query_ends[number : number + 2]), slice(*key_ends[number : number + 2])

    def forward(q, k, v, scale, call):
        mean, lse = q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_zeros(q.shape[:2])
        for query, key in parts(call):
            scores = logits(q[query], k[key], scale, call)
            value = v[key].repeat_interleave(q.shape[1] // v.shape[1], 1)
            mean[query] = torch.einsum("hts,she->the", scores.softmax(-1), value)
            lse[query] = scores.logsumexp(-1).T
        return mean, lse

    def backward(q, k, v, scale, call, *, d_out, mean, lse):
        sums = [torch.zeros_like(x) for x in (q, k, v)]
        for query, key in parts(call):
            leaves = [x.clone().requires_grad_() for x in (q[query], k[key], v[key])]
            with torch.enable_grad():
                scores = logits(leaves[0], leaves[1], scale, call)
                value = leaves[2].repeat_interleave(q.shape[1] // v.shape[1], 1)
                weight = (scores - lse[query].T[..., None]).exp()
                # The gradient of a softmax over all keys, of which these are a part.
                delta = (d_out[query] * mean[query]).sum(-1).T[..., None]
                d_weight = torch.einsum("the,she->hts", d_out[query], value)
                moved = (scores * (weight * (d_weight - delta)).detach()).nan_to_num(0).sum()
                taken = torch.einsum("hts,she,the->", weight.detach(), value, d_out[query])
                grads = torch.autograd.grad(moved + taken, leaves)
            for total, place, grad in zip(sums, (query, key, key), grads):
                total[place] += grad
        return sums

    return SimpleNamespace(
        takes_packed=lambda *tensors: True, forward_packed=forward, backward_packed=backward
    )


@pytest.mark.parametrize("name", ["causal", "sliding", "ahead too", "documents"])
def test_calls_compute_what_tiles_do_alone_and_over_ranks(name, monkeypatch):
    torch.manual_seed(0)
    span = packed()
    shapes = (4, 6), (2, 6), (2, 5)
    given = [torch.randn(*span.shape, *shape, dtype=torch.float64) for shape in shapes]
    weight = torch.randn(*span.shape, 4, 5, dtype=torch.float64) * span.valid()[..., None, None]

    def run(queries, keys, choose):
        leaves = [x.clone().requires_grad_() for x in given]
        q = choose[0](leaves[0])
        mean = Softmax(MASKS[name], Score())(
            [q], [choose[1](x) for x in leaves[1:]], span=queries, kv_span=keys
        )
        (mean * choose[0](weight)).sum().backward()
        return [mean.detach(), *(x.grad for x in leaves)]

    shared = layouts("zigzag", span, 3)
    cuts = [shard_span(span, shared, rank) for rank in range(3)]
    choices = [(span, span, (lambda x: x, lambda x: x))]
    for mine, other in ((0, 0), (2, 0), (1, 2)):
        pick = [lambda x, cut=cuts[r].sharding: cut.shard(x, 0) for r in (mine, other)]
        choices.append((cuts[mine], cuts[other], pick))
    assert LENGTHS[0] != LENGTHS[1], "rows of unlike documents"
    for queries, keys, choose in choices:
        want = run(queries, keys, choose)
        with monkeypatch.context() as patch:
            patch.setattr(blockwise, "select_kernel", lambda *about: stand_in())
            got = run(queries.fresh(), keys, choose)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
