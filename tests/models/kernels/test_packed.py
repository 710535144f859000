"""Packed documents on a GPU: arguments are laid out as a kernel wants them, and what comes back is
the reference's."""

import pytest
import torch

from models.kernels import blockwise, packed, reference, sdpa_cuda
from models.kernels.band_plan import plan_bands
from models.masks.basic import Causal, SameDocument, SlidingWindow
from models.scores import Score
from models.span import Span
from tests.support.cuda_kernels import BOUND, GPUS, SCALE, stand_in, tensors

DOCUMENTS = Span.of(
    torch.cat([torch.arange(n) for n in (30, 1, 59)])[None],
    torch.repeat_interleave(torch.arange(3), torch.tensor([30, 1, 59]))[None],
)
BANDS = {
    "causal": Causal() & SameDocument(),
    "window": Causal() & SameDocument() & SlidingWindow(7),
    "documents": SameDocument(),
    "later too": SameDocument() & SlidingWindow(9),
}


def check_packed(mask, dtype, device, bound, shape=(4, 2, 16, 24), keys=90):
    """Packed documents, in calls of many, beside the reference; the first `keys` keys alone, as
    where they travel in parts."""
    heads, kv_heads, key, value = shape
    q, k, v = tensors(90, 90, heads, kv_heads, key, value, dtype=dtype, device=device)
    q, k, v = q[:1], k[:1, :keys], v[:1, :keys]
    d_out = torch.randn(1, 90, heads, value, device=device).to(dtype).float()
    span = DOCUMENTS.map(lambda t: t.to(device))
    kv_span = span.map(lambda t: t[:, :keys])
    calls = plan_bands(mask, span, kv_span)
    assert calls
    total = blockwise.empty_partial((q,), heads, value)
    packed.forward_bands(sdpa_cuda, calls, (q, k, v), SCALE, total)
    everyone = torch.arange(heads, device=device)
    wide = [x.double() for x in (q, k, v)]
    mean, lse = reference.forward(
        Score(SCALE), mask, wide[:1], wide[1:], (), span, kv_span, everyone
    )
    want = reference.backward(
        Score(SCALE),
        mask,
        wide[:1],
        wide[1:],
        (),
        span,
        kv_span,
        everyone,
        d_out=d_out.double(),
        lse=lse,
        delta=(d_out.double() * mean).sum(-1),
    )
    sums = blockwise.Gradients.zeros((q,), (k, v), ())
    sums = [*sums.query, *sums.payload]
    packed.backward_bands(
        sdpa_cuda, calls, (q, k, v), sums, SCALE, d_out=d_out, total=(mean.float(), lse.float())
    )
    for got, right in zip((*total, *sums), (mean, lse, *want)):
        spread = float(right[right.isfinite()].std())
        torch.testing.assert_close(got.double(), right, rtol=bound, atol=bound * max(1, spread))


@pytest.mark.parametrize("keys", [90, 12, 45])
@pytest.mark.parametrize("name", BANDS)
def test_packed_stretches_are_what_the_reference_computes(monkeypatch, name, keys):
    called = stand_in(monkeypatch)
    # Of few keys the means are larger, and rounded as they go to the backward pass.
    check_packed(BANDS[name], torch.bfloat16, "cpu", 1e-2 if keys == 90 else 2e-2, keys=keys)
    assert set(called) == {"packed"}


def test_packed_calls_are_for_half_precision_alone():
    for dtype, takes in ((torch.bfloat16, True), (torch.float32, False), (torch.float64, False)):
        assert sdpa_cuda.takes_packed(*tensors(8, 8, dtype=dtype)) is takes


if GPUS:  # where there are none there is nothing to skip

    @pytest.mark.parametrize("device", GPUS, ids=str)
    @pytest.mark.parametrize("dtype", sdpa_cuda.HALF, ids=str)
    @pytest.mark.parametrize("name", BANDS)
    def test_on_a_gpu_packed_stretches_are_what_the_reference_computes(device, dtype, name):
        for shape in ((4, 2, 16, 24), (2, 2, 64, 64), (8, 2, 128, 128)):
            check_packed(BANDS[name], dtype, device, BOUND[dtype], shape)
        check_packed(BANDS[name], dtype, device, BOUND[dtype], keys=12)
