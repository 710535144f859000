"""Attention of few queries: heads that share a key head are computed as queries of one head."""

import torch

from models.cache.attention import attend, folded_queries, unfolded_queries
from models.kernels import reference
from models.kernels.blockwise import AttentionSpec
from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.positions.alibi import Alibi
from models.positions.none import NoPosition
from models.span import PADDING, Span


def test_folding_keeps_heads_in_their_order():
    q = torch.arange(2 * 3 * 6 * 2).view(2, 3, 6, 2)
    folded = folded_queries(q, 3)
    assert folded.shape == (2, 9, 2, 2)
    # Query 1, head 4 is the second of the heads that share key head 1.
    assert torch.equal(folded[:, 3 + 1, 1], q[:, 1, 4])
    assert torch.equal(unfolded_queries(folded, 3), q)


def test_it_is_the_reference_kernel_with_masks_biases_and_padding():
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = Causal() & SameDocument() & SlidingWindow(6)
    kv_pos = torch.arange(11).expand(2, 11)
    kv_doc = torch.zeros_like(kv_pos)
    kv_doc[1, 8:] = PADDING
    kv_span = Span.of(kv_pos, kv_doc)
    pos = torch.tensor([[9, 10, 11], [5, 6, 7]])
    for position in (NoPosition(), Alibi()):
        score, _ = position.score(6, 4)
        spec = AttentionSpec(score, mask, torch.arange(6))
        for queries in (1, 3):
            span = Span.of(pos[:, :queries], torch.zeros_like(pos[:, :queries]))
            query = (normal(2, queries, 6, 4),)
            payload = normal(2, 11, 2, 4), normal(2, 11, 2, 5)
            places = {"span": span, "kv_span": kv_span}
            mean, lse = attend(spec, query, payload, (), **places)
            wanted = reference.forward(score, mask, query, payload, (), span, kv_span, spec.heads)
            assert (mean - wanted[0]).abs().max() < 1e-13
            assert (lse - wanted[1]).abs().max() < 1e-13
