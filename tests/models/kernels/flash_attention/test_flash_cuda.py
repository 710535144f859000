"""flash-attn as it is installed: each version that serves this GPU is the reference, blocks and
packed stretches, forward and backward with the lse from outside."""

import pytest
import torch

from models.kernels import sdpa_cuda
from models.kernels.flash_attention import releases
from models.masks.algebra import Mask
from models.masks.basic import Causal
from tests.models.kernels.test_packed import BANDS, check_packed
from tests.models.kernels.test_sdpa_cuda import SHAPES, check
from tests.support.cuda_kernels import BOUND, GPUS, tensors

WIDTHS = {**SHAPES, "wide": (130, 130, 4, 2, 128, 64), "latent": (130, 66, 4, 4, 192, 128)}


def serving():
    """(GPU, version) that is installed and taken on it."""
    pairs = [(device, name) for device in GPUS for name in releases.available()]
    return [
        (device, name)
        for device, name in pairs
        if name in sdpa_cuda.ORDER.get(torch.cuda.get_device_capability(device)[0], ())
    ]


@pytest.fixture(autouse=True)
def _no_version_is_given_up():
    yield
    assert not releases.GIVEN_UP


def alone(monkeypatch, name):
    """Has this version serve before all others."""
    for generation in sdpa_cuda.ORDER:
        monkeypatch.setitem(sdpa_cuda.ORDER, generation, (name,))


if serving():  # where there are none there is nothing to skip

    @pytest.mark.parametrize("dtype", sdpa_cuda.HALF, ids=str)
    @pytest.mark.parametrize("device, name", serving(), ids=str)
    def test_on_a_gpu_a_block_is_what_the_reference_computes(monkeypatch, device, name, dtype):
        alone(monkeypatch, name)
        for queries, keys, *rest in WIDTHS.values():
            some = tensors(queries, keys, *rest, dtype=dtype, device=device)
            check(some, Mask(), False, bound=BOUND[dtype])
            some = tensors(queries, queries, *rest, dtype=dtype, device=device)
            check(some, Causal(), True, bound=BOUND[dtype])

    @pytest.mark.parametrize("band", BANDS)
    @pytest.mark.parametrize("device, name", serving(), ids=str)
    def test_on_a_gpu_packed_stretches_are_too(monkeypatch, device, name, band):
        alone(monkeypatch, name)
        for keys in (90, 12):
            check_packed(BANDS[band], torch.float16, device, BOUND[torch.float16], keys=keys)
