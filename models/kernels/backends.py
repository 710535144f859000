"""Chooses the kernel that computes an attention: one table, from device and dtype to module.

Not in the table are float64 on a GPU, devices of other makers, and scores that are more than a
scaled dot product and a bias: they use the reference kernel. A kernel module itself handles blocks
with and without a matrix to add.
"""

from types import ModuleType

import torch

from models.kernels import sdpa_cpu, sdpa_cuda
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


def select_kernel(device: torch.device, dtype: torch.dtype, score: Score) -> ModuleType | None:
    """Returns the module whose `forward` and `backward` take blocks of this score on this device.

    None means the reference kernel.
    """
    # PyTorch calls AMD's devices cuda too; the kernels here were never checked on them.
    is_rocm = device.type == "cuda" and torch.version.hip is not None
    if is_rocm or not score.plain:
        return None
    return TABLE.get((device.type, dtype))
