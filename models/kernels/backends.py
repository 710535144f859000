"""Chooses the kernel that computes an attention: one table, from device and dtype to module.

Not in the table are float64 on a GPU, devices of other makers, and scores that are more than a
scaled dot product and a bias: they use the reference kernel. A kernel module itself handles blocks
with and without a matrix to add. Soft caps have a kernel of their own where flash-attn is installed
and the mask is bands. PAIRWISE lists what our own Triton kernels serve, which work out
who sees whom by themselves (triton_attention/dispatch.py says when).
"""

import warnings
from functools import lru_cache
from types import ModuleType

import torch

from models.kernels import sdpa_cpu, sdpa_cuda
from models.kernels.flash_attention.capped import CappedKernel, capped_kernel
from models.scores import Score

TABLE: dict[tuple[str, torch.dtype], ModuleType] = {
    ("cpu", torch.float64): sdpa_cpu,
    ("cpu", torch.float32): sdpa_cpu,
    ("cpu", torch.bfloat16): sdpa_cpu,
    ("cpu", torch.float16): sdpa_cpu,
    ("cuda", torch.float32): sdpa_cuda,
    ("cuda", torch.bfloat16): sdpa_cuda,
    ("cuda", torch.float16): sdpa_cuda,
}
PAIRWISE: set[tuple[str, torch.dtype]] = {
    ("cuda", torch.float32),
    ("cuda", torch.bfloat16),
    ("cuda", torch.float16),
}


def select_kernel(device: torch.device, dtype: torch.dtype, score: Score) -> ModuleType | None:
    """Returns the module whose `forward` and `backward` take blocks of this score on this device.

    None means the reference kernel.
    """
    # PyTorch calls AMD's devices cuda too; the kernels here were never checked on them.
    is_rocm = device.type == "cuda" and torch.version.hip is not None
    if is_rocm or not score.plain:
        return None
    return TABLE.get((device.type, dtype))


def select_capped(device: torch.device, dtype: torch.dtype, score: Score) -> CappedKernel | None:
    """Returns the kernel that takes bands of a score with a soft cap, which `select_kernel` does
    not serve; None where there is none."""
    is_rocm = device.type == "cuda" and torch.version.hip is not None
    half = dtype in sdpa_cuda.HALF and TABLE.get((device.type, dtype)) is sdpa_cuda
    return capped_kernel(score) if half and not is_rocm else None


@lru_cache
def load_pairwise() -> ModuleType | None:
    """Returns the module of our Triton kernels; None where Triton is missing or fails to import.

    A failed import is warned of once.
    """
    try:
        from models.kernels.triton_attention import launch

        return launch
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return None
        problem = error
    except Exception as error:
        # A package built for another version of torch may fail in any way.
        problem = error
    give_up_pairwise(problem)
    return None


def load_compiler() -> ModuleType:
    """Returns the module that compiles our Triton kernels without a GPU.

    Raises:
        ModuleNotFoundError: Triton is missing.
    """
    from models.kernels.triton_attention import compiled

    return compiled


def give_up_pairwise(problem: Exception) -> None:
    """Has no further attention served by our Triton kernels, and warns why."""
    PAIRWISE.clear()
    warnings.warn(
        f"no Triton kernels ({type(problem).__name__}: {problem}); attention with masks that are no"
        " bands is slower",
        stacklevel=3,
    )
