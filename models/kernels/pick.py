"""Which kernel computes an attention: one table, from what is wanted to who does it."""

from types import ModuleType

import torch

from models.kernels import cpu
from models.scores import Score


def pick(device: torch.device, score: Score) -> ModuleType | None:
    """The module whose `forward` and `backward` take blocks of this score on this device; None means the general tile."""
    if not score.plain:
        return None
    return {"cpu": cpu}.get(device.type)
