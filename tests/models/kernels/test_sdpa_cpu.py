"""The four edges of PyTorch's CPU flash kernel are guarded, and what comes out is what the general
tile says."""

import pytest
import torch

from models.kernels import reference, sdpa_cpu
from models.masks.algebra import Mask
from models.masks.basic import Causal
from models.scores import Score
from models.span import Span

SCALE = 0.3


def tensors(queries, keys, heads=4, kv_heads=2, width=6, value=6, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (1, queries, heads, width), (1, keys, kv_heads, width), (1, keys, kv_heads, value)
    return [torch.randn(*shape, dtype=torch.float64).to(dtype) for shape in shapes]


def truth(q, k, v, mask):
    span, kv_span = (Span.line(1, x.shape[1]) for x in (q, k))
    return reference.forward(
        Score(SCALE), mask, (q,), (k, v), (), span, kv_span, torch.arange(q.shape[2])
    )


def true_gradients(q, k, v, mask, d_out, mean, lse):
    span, kv_span = (Span.line(1, x.shape[1]) for x in (q, k))
    rest = {"d_out": d_out, "lse": lse, "delta": (d_out * mean).sum(-1)}
    return reference.backward(
        Score(SCALE), mask, (q,), (k, v), (), span, kv_span, torch.arange(q.shape[2]), **rest
    )


def check(q, k, v, mask, triangle, add=None):
    mean, lse = sdpa_cpu.forward(q, k, v, SCALE, triangle, add)
    want = truth(q, k, v, mask)
    torch.testing.assert_close(mean, want[0])
    torch.testing.assert_close(lse, want[1])
    d_out = torch.randn_like(mean)
    got = sdpa_cpu.backward(q, k, v, SCALE, triangle, add, d_out=d_out, mean=mean, lse=lse)
    for a, b in zip(got, true_gradients(q, k, v, mask, d_out, mean, lse)):
        torch.testing.assert_close(a, b)


def test_full_and_triangle_blocks_equal_the_tile():
    check(*tensors(7, 9), Mask(), False)
    check(*tensors(8, 8), Causal(), True)


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0)])
def test_an_empty_side_is_refused_before_it_kills_the_process(queries, keys):
    with pytest.raises(ValueError, match=f"a block has queries and keys, got {queries} and {keys}"):
        sdpa_cpu.forward(*tensors(queries, keys), SCALE, False, None)


def test_a_last_dim_that_is_not_contiguous_is_right():
    q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors(7, 7))
    assert q.stride(-1) != 1
    check(q, k, v, Causal(), True)
    mean, lse = sdpa_cpu.forward(q, k, v, SCALE, True, None)
    d_out, crooked = torch.randn_like(mean), mean.transpose(1, 3).contiguous().transpose(1, 3)
    straight = sdpa_cpu.backward(q, k, v, SCALE, True, None, d_out=d_out, mean=mean, lse=lse)
    bent = sdpa_cpu.backward(q, k, v, SCALE, True, None, d_out=d_out, mean=crooked, lse=lse)
    for a, b in zip(bent, straight):
        torch.testing.assert_close(a, b)


def test_a_query_that_sees_no_key_has_mass_minus_infinity_and_no_gradient():
    q, k, v = tensors(4, 5)
    add = torch.zeros(1, 1, 4, 5, dtype=q.dtype)
    add[..., 2, :] = -torch.inf
    mean, lse = sdpa_cpu.forward(q, k, v, SCALE, False, add)
    assert (lse[:, 2] == -torch.inf).all() and not mean[:, 2].any()
    assert lse[:, [0, 1, 3]].isfinite().all()
    grads = sdpa_cpu.backward(
        q, k, v, SCALE, False, add, d_out=torch.ones_like(mean), mean=mean, lse=lse
    )
    assert not grads[0][:, 2].any() and all(g.isfinite().all() for g in grads)
    kept = sdpa_cpu.backward(
        q[:, [0, 1, 3]],
        k,
        v,
        SCALE,
        False,
        add[..., [0, 1, 3], :],
        d_out=torch.ones_like(mean[:, :3]),
        mean=mean[:, [0, 1, 3]],
        lse=lse[:, [0, 1, 3]],
    )
    for a, b in zip(grads[1:], kept[1:]):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("width, value", [(6, 3), (3, 6)])
def test_values_may_be_wider_or_narrower_than_keys(width, value):
    check(*tensors(7, 7, width=width, value=value), Causal(), True)


def test_half_precision_is_computed_in_float32():
    q, k, v = tensors(7, 7, dtype=torch.bfloat16)
    mean, lse = sdpa_cpu.forward(q, k, v, SCALE, True, None)
    assert mean.dtype == lse.dtype == torch.float32
    want = truth(*(x.double() for x in (q, k, v)), Causal())
    torch.testing.assert_close(mean.double(), want[0], rtol=1e-5, atol=1e-6)
