"""A mixer of one's own, trained with its rows shared over two ranks:

    python -m trainer experiment=quickstart steps=20 mixer._target_=examples.own_mixer.Cosine

Run as a script, it shows that the mixer sees no later token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.masks.basic import Causal, SameDocument
from models.primitives.softmax import Softmax
from models.span import Span


class Cosine(nn.Module):
    """Attention by the cosine between queries and keys, with a learned temperature per head."""

    def __init__(self, width: int, heads: int, temperature: float = 0.1):
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        # A parameter that a layer makes itself starts as its constructor fills it.
        self.temperature = nn.Parameter(torch.full((heads, 1), temperature))
        # Tokens meet in a primitive and nowhere else; that is what lets ranks share a row.
        self.mix = Softmax(Causal() & SameDocument())

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        # The primitive divides by the root of the head width, as attention does by default.
        scale = query.shape[-1] ** 0.5
        query = scale * F.normalize(query, dim=-1) / self.temperature
        mean = self.mix((query,), (F.normalize(key, dim=-1), value), span=span)
        return self.out(mean.flatten(-2))


def main() -> float:
    """Returns the largest change of earlier outputs when the last token changes: 0."""
    torch.manual_seed(0)
    layer = Cosine(width=32, heads=4)
    hidden = torch.randn(1, 10, 32)
    changed = torch.cat([hidden[:, :-1], torch.randn(1, 1, 32)], 1)
    span = Span.line(rows=1, tokens=10)
    difference = layer(hidden, span) - layer(changed, span)
    return difference[:, :-1].abs().max().item()


if __name__ == "__main__":
    print(f"earlier outputs change by {main()}")
