"""A mixer with a bug that shows in the third step, for tests of what is told of a crash."""

import os

import torch
from torch import Tensor, nn

from models.span import Span


class Breaking(nn.Module):
    """Hands its input on, twice."""

    def __init__(self, width: int):
        super().__init__()
        self.out, self.calls = nn.Linear(width, width), 0

    def forward(self, x: Tensor, span: Span) -> Tensor:
        self.calls += 1
        if self.calls > 2:
            raise RuntimeError("a bug that a user wrote")
        return self.out(x)


class BreakingJob(nn.Module):
    """Hands its input on; fails in the ranks of a job with `broken`, while BREAK is set."""

    def __init__(self, width: int, broken: bool = False):
        super().__init__()
        self.out = nn.Linear(width, width, bias=False)
        self.broken = broken

    def forward(self, x: Tensor, span: Span) -> Tensor:
        # The check before the start runs it too, and must find nothing.
        if self.broken and "BREAK" in os.environ and torch.distributed.is_initialized():
            raise RuntimeError("a bug that a user wrote")
        return self.out(x)
