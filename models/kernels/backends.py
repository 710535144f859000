"""Which kernel computes an attention: one table, from what is wanted to who does it.

Not in the table are float64 on a GPU, devices of other makers, and scores that are more than a
scaled dot product and a bias: they have the general tile. Whether a block comes with a matrix to
add, a module sorts out within itself.
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
    """The module whose `forward` and `backward` take blocks of this score on this device; None
    means the general tile."""
    foreign = (
        device.type == "cuda" and torch.version.hip is not None
    )  # PyTorch calls AMD's devices cuda too
    return TABLE.get((device.type, dtype)) if score.plain and not foreign else None
