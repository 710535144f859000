"""A mixer with a bug that shows in the third step, for tests of what is told of a crash."""

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
