"""Random features and their attention against performer-pytorch, with its epsilons set to 0."""

import torch
from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda, softmax_kernel

from models.primitives.scan import Scan
from models.recurrent.linear import weighted_mean
from models.recurrent.performer import Performer, directions
from models.span import Span
from tests.support.parity import relative


def case():
    """(our layer, queries, keys, values [B, T, H, D], their features of both [B, H, T, M])."""
    layer = Performer(16, 2, seed=3, layer=1, features=24)
    q, k, v = (torch.randn(2, 40, 2, 8, dtype=torch.float64) for _ in range(3))
    drawn = directions(3, 1, 0, 2, 24, 8)
    theirs = [
        torch.cat(
            [
                softmax_kernel(
                    y[:, None, :, h], projection_matrix=drawn[h], is_query=query, eps=0.0
                )
                for h in range(2)
            ],
            1,
        )
        for y, query in ((q, True), (k, False))
    ]
    return layer, q, k, v, theirs


def test_features_are_theirs_up_to_a_factor_for_each_query_and_one_for_all_keys():
    layer, q, k, _, theirs = case()
    ours = [layer.features(y, query).transpose(1, 2) for y, query in ((q, True), (k, False))]
    for mine, other, dims in zip(ours, theirs, ((-1,), (-2, -1))):
        assert (
            relative(mine / mine.sum(dims, keepdim=True), other / other.sum(dims, keepdim=True))
            < 1e-12
        )


def test_causal_attention_is_theirs():
    layer, q, k, v, theirs = case()
    want = causal_linear_attention_noncuda(
        *theirs, v.transpose(1, 2), chunk_size=8, eps=0.0
    ).transpose(1, 2)
    got = weighted_mean(
        Scan(), layer.features(q, True), layer.features(k, False), v, Span.line(2, 40)
    )
    assert relative(got, want) < 1e-12
