"""What is recalled against sorting everything by brute force; with all entries it is full attention
over the store."""

import pytest
import torch

from models.attention.functional import attention_weights, context_vector
from models.kernels import knn as kernel_knn
from models.kernels.knn import KeyValueStore
from models.masks.algebra import Mask
from models.masks.basic import Causal, SameDocument
from models.masks.segments import PreviousTokens
from models.primitives import knn
from models.primitives.knn import KNN
from models.span import Span
from tests.support.parity import packed, relative

HEADS, GROUPS, WIDTH = 4, 2, 3


def tensors(span: Span, rounded: bool = False):
    """q, k, v and a scale; rounded to whole numbers many scores are equal."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (
        noise(*span.shape, *shape) for shape in ((HEADS, WIDTH), (GROUPS, WIDTH), (GROUPS, 5))
    )
    return (q.round() if rounded else q), (k.round() if rounded else k), v, noise(HEADS).exp()


def brute(q, k, mask: Mask, span: Span, count: int):
    """[row][token][head] the positions found, by sorting all that is seen by (score, position)."""
    seen = mask.dense(span, span)[:, 0] & span.valid()[:, :, None] & span.valid()[:, None]
    found = []
    for row in range(len(q)):
        found.append([])
        for t in range(span.shape[1]):
            heads = []
            for head in range(HEADS):
                scores = (k[row, :, head // (HEADS // GROUPS)] * q[row, t, head]).sum(-1).tolist()
                order = sorted(
                    (-scores[s], int(span.pos[row, s]))
                    for s in seen[row, t].nonzero()[:, 0].tolist()
                )
                heads.append([pos for _, pos in order[:count]])
            found[-1].append(heads)
    return found


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("scores", [1 << 22, 64])  # all at once, and block by block
@pytest.mark.parametrize("reach", [9, 100])  # few to choose from, and many
def test_the_best_are_those_of_brute_force_also_where_many_are_equal(
    reach, scores, rounded, monkeypatch
):
    monkeypatch.setattr(kernel_knn, "CHUNK_SCORES", scores)
    monkeypatch.setattr(kernel_knn, "CHUNK_QUERIES", 256 if scores > 64 else 10)
    span, mask = packed(), SameDocument() & PreviousTokens(4, reach)
    q, k, v, _ = tensors(span, rounded)
    best = KNN(mask, 3).search(q, [KeyValueStore(k, v, span)], span)
    want = brute(q, k, mask, span, 3)
    got = [
        [[[p for p in head if p >= 0] for head in token] for token in row]
        for row in best.pos.tolist()
    ]
    assert got == want
    keys, _, index = KNN(mask, 3).bring(best.entry, [KeyValueStore(k, v, span)], q.device)
    there = best.entry >= 0
    assert relative((keys[index] * q[..., None, :]).sum(-1)[there], best.score[there]) < 1e-14


def test_entries_of_several_stores_are_found_as_if_they_were_one():
    span, mask = packed(), SameDocument() & Causal()
    q, k, v, scale = tensors(span, rounded=True)
    parts = [slice(0, 7), slice(7, 30), slice(30, 51)]
    stores = [KeyValueStore(k[:, p], v[:, p], span.map(lambda t, p=p: t[:, p])) for p in parts]
    leaf = KNN(mask, 4)
    whole, found = leaf((q,), [KeyValueStore(k, v, span)], (scale,), span=span)
    for order in (stores, stores[::-1]):
        got, there = leaf((q,), order, (scale,), span=span)
        assert relative(got, whole) < 1e-14 and torch.equal(there, found)


@pytest.mark.parametrize("chunk", [1 << 22, 100])
def test_all_entries_are_full_attention_over_the_store(chunk, monkeypatch):
    monkeypatch.setattr(kernel_knn, "CHUNK_SCORES", chunk)
    monkeypatch.setattr(knn, "CHUNK_NUMBERS", chunk)
    span, mask = packed(), SameDocument() & Causal()
    q, k, v, scale = tensors(span)
    seen = mask.dense(span, span) & span.valid()[:, None, :, None] & span.valid()[:, None, None, :]
    leaves = [q.requires_grad_(), scale.requires_grad_()]
    products = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(2, 2)) * scale[:, None, None]
    want = context_vector(attention_weights(products.masked_fill(~seen, -torch.inf)), v)
    got, found = KNN(mask, span.shape[1])((q,), [KeyValueStore(k, v, span)], (scale,), span=span)
    assert relative(got, want) < 1e-13
    assert torch.equal(found, seen.any(-1).transpose(1, 2).expand_as(found))
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=got.dtype)
    for a, b in zip(
        *(
            torch.autograd.grad((out * weight).sum(), leaves, retain_graph=True)
            for out in (got, want)
        )
    ):
        assert relative(a, b) < 1e-12


def test_a_query_that_finds_nothing_gets_zeros_and_no_gradient():
    span, mask = packed(), SameDocument() & PreviousTokens(4, 9)
    q, k, v, scale = tensors(span)
    q.requires_grad_()
    got, found = KNN(mask, 3)((q,), [KeyValueStore(k, v, span)], (scale,), span=span)
    assert torch.equal(found[..., 0], span.valid() & (span.pos >= 4))
    got.sum().backward()
    assert (
        q.grad is not None
        and got[~found].eq(0).all()
        and q.grad[~found].eq(0).all()
        and q.grad[found].ne(0).any()
    )
    none, found = KNN(mask, 3)((q,), [], (scale,), span=span)
    assert none.eq(0).all() and not found.any() and none.requires_grad


def test_a_document_that_is_not_a_number_is_found_by_itself_alone():
    span, mask = packed(), SameDocument() & PreviousTokens(4, 100)
    q, k, v, scale = tensors(span)
    sick = ((span.doc == 0) & (torch.arange(2) == 0)[:, None])[..., None, None]  # the first of all

    def both(q, k, v):
        leaf = q.clone().requires_grad_()
        out, found = KNN(mask, 2)((leaf,), [KeyValueStore(k, v, span)], (scale,), span=span)
        return out, found, torch.autograd.grad(out.masked_fill(sick, 0).sum(), leaf)[0]

    want, got = both(q, k, v), both(*(x.masked_fill(sick, torch.nan) for x in (q, k, v)))
    for a, b in zip(got, want):
        assert torch.equal(a[~sick[..., 0, 0]], b[~sick[..., 0, 0]])
