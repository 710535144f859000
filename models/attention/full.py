"""Grouped-query attention: several query heads share a head of keys and values."""

from torch import Tensor, nn

from models.masks import Causal, Mask, SameDocument
from models.mixing.softmax import Softmax
from models.positions.position import Position
from models.span import Span

CAUSAL = Causal() & SameDocument()


class Attention(nn.Module):
    """Project, place, mix, project back; causal within a document.

    Args:
        width: of what comes in and goes out.
        heads: query heads; they divide width.
        kv_heads: key and value heads; they divide heads. heads: multi-head, 1: multi-query attention.
        position: how queries and keys learn where they stand.
        mask: which keys a query sees.

    Source: Ainslie et al. 2023 (arXiv:2305.13245); multi-query Shazeer 2019 (arXiv:1911.02150). No biases.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, position: Position, *, mask: Mask = CAUSAL):
        super().__init__()
        if width % heads:
            raise ValueError(f"model.width={width} does not divide among model.heads={heads}; choose a multiple of {heads}")
        if heads % kv_heads:
            raise ValueError(f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose a divisor of {heads}")
        self.head_width, self.placing = width // heads, position
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, width, bias=False)
        score, self.tables = position.score(heads, self.head_width)
        self.mix = Softmax(mask, score)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, k, v = (project(x).unflatten(-1, (-1, self.head_width)) for project in (self.q, self.k, self.v))
        q, k = self.placing.turn(q, span), self.placing.turn(k, span)
        params = self.tables() if self.tables is not None else ()
        return self.out(self.mix((q,), (k, v), params, at=span).flatten(-2))


class MultiHead(Attention):
    """Every query head has keys and values of its own (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, heads, position)


class MultiQuery(Attention):
    """All query heads share one head of keys and values (Shazeer 2019, arXiv:1911.02150)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, 1, position)
