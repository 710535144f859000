"""Every way of taking many experts' products gives the same, and nothing outside the experts'
stretches gets through."""

import pytest
import torch

from models.kernels.grouped_mm import at_once, grouped_mm, one_by_one, padded

COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [0, 9, 0, 0], [2, 2, 2, 3]]


def given(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(11, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 8, 16, generator=generator).to(dtype).requires_grad_()
    return x, weight


def spelled(x, weight, counts):
    owners = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    rows = [x[i] @ weight[e].T for i, e in enumerate(owners)]
    return torch.stack([*rows, *[x.new_zeros(8)] * (len(x) - len(rows))]) + 0 * (
        x.sum() + weight.sum()
    )


@pytest.mark.every_case
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("way", [one_by_one, padded])
def test_a_row_meets_the_matrix_of_its_expert(way, counts):
    x, weight = given(torch.float64)
    grad = torch.randn(11, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = way(x, weight, torch.tensor(counts))
    want = spelled(x, weight, counts)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-13)
    have = torch.autograd.grad((out * grad).sum(), (x, weight))
    for a, b in zip(have, torch.autograd.grad((want * grad).sum(), (x, weight))):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("counts", [c for c in COUNTS if sum(c)], ids=str)
def test_the_grouped_kernel_gives_the_same_and_leaves_no_rubbish(counts):
    """In bfloat16, which it is used in; both round the same sums of 16 products."""
    x, weight = given(torch.bfloat16)
    out = at_once(x, weight, torch.tensor(counts))
    want = one_by_one(x, weight, torch.tensor(counts))
    torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
    assert (out[sum(counts) :] == 0).all()
    have, wanted = (torch.autograd.grad(y.float().square().sum(), (x, weight)) for y in (out, want))
    for a, b in zip(have, wanted):
        torch.testing.assert_close(a, b, rtol=5e-2, atol=5e-1)
    assert (have[0][sum(counts) :] == 0).all()


def test_rows_past_the_last_stretch_may_hold_anything():
    x, weight = given(torch.float64)
    poisoned = x.detach().clone()
    poisoned[9:] = torch.nan
    for way in (one_by_one, padded):
        held = poisoned.clone().requires_grad_()
        out = way(held, weight, torch.tensor(COUNTS[0]))
        (grad,) = torch.autograd.grad(out.sum(), held)
        assert out.isfinite().all() and grad.isfinite().all()


def test_sizes_are_known_without_numbers():
    x, weight = (t.detach().to("meta") for t in given(torch.float32))
    assert grouped_mm(x, weight, torch.empty(4, dtype=torch.long, device="meta")).shape == (11, 8)
