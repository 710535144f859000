"""The Triton kernels compile for GPUs that are not there, and keep their numbers in registers."""

import pytest
import torch

from models.kernels.triton_attention.compiled import ARCHITECTURES, CASES, compiled_kernels
from models.kernels.triton_attention.sizes import FORWARD, KEY_GRADIENT

MOST_SPILLED = 64  # bytes of a thread
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a program may have


def check(found):
    found = list(found)
    for kernel in found:
        assert kernel.spilled <= MOST_SPILLED, kernel
        assert 0 < kernel.registers <= 255, kernel
        assert kernel.shared <= SHARED[kernel.architecture], kernel
    return len(found)


def test_a_kernel_of_each_generation_keeps_its_numbers_in_registers():
    sizes = {"widths": ((64, 64),), "dtypes": (torch.bfloat16,), "cases": ("ALiBi",)}
    assert check(compiled_kernels(kernels=(FORWARD, KEY_GRADIENT), **sizes)) == 6


@pytest.mark.full
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_all_kernels_do(architecture):
    assert check(compiled_kernels(architectures=(architecture,))) == 3 * len(CASES) * (4 + 1)
