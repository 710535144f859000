"""Grouped-query attention: several query heads share a head of keys and values."""

from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.masks.algebra import Mask
from models.masks.basic import Causal, SameDocument
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.span import Span

CAUSAL = Causal() & SameDocument()


class Attention(SplitAttention):
    """Project, place, mix, project back; causal within a document.

    Args:
        width: of what comes in and goes out.
        heads: query heads; they divide width.
        kv_heads: key and value heads; they divide heads. heads: multi-head, 1: multi-query
            attention.
        position: how queries and keys learn where they stand.
        mask: which keys a query sees.

    Attributes: beside: a memory (q [B, T, H, D], k and v [B, T, G, D], all without positions, means
        [B, T, H, D], span) -> means
            with what it remembers in them; or None.

    Source: Ainslie et al. 2023 (arXiv:2305.13245); multi-query Shazeer 2019 (arXiv:1911.02150). No
    biases.
    """

    beside: nn.Module | None

    def __init__(
        self, width: int, heads: int, kv_heads: int, position: Position, *, mask: Mask = CAUSAL
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose a divisor"
                f" of {heads}"
            )
        self.head_width = width // heads
        self.position = position
        self.q = nn.Linear(width, heads * self.head_width, bias=False)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(heads * self.head_width, width, bias=False)
        score, self.tables = position.score(heads, self.head_width)
        self.mix = Softmax(mask, score)
        self.register_module("beside", None)

    def project_query(self, x: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, H, D], not told where they stand."""
        return self.q(x).unflatten(-1, (-1, self.head_width))

    def project_payload(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D], not told where they stand."""
        k, v = (project(x).unflatten(-1, (-1, self.head_width)) for project in (self.k, self.v))
        return k, v

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Keys and values [B, S, G, D]; with something `beside`, also the keys as that takes
        them."""
        k, v = self.project_payload(x)
        placed = self.position.rotate(k, span), v
        return placed if self.beside is None else (*placed, k)

    def attend_heads(
        self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: the mean of what each head of each token sees."""
        params = self.tables() if self.tables is not None else ()
        q = self.project_query(x)
        means = self.mix(
            (self.position.rotate(q, span),), payload[:2], params, span=span, kv_span=kv_span
        )
        if self.beside is not None:
            v, k = (each[:, each.shape[1] - x.shape[1] :] for each in payload[1:])
            means = self.beside(q, k, v, means, span)
        return means.flatten(-2)

    def attend(self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width], given the keys and values of the tokens `of`."""
        return self.out(self.attend_heads(x, span, payload, kv_span))


class MultiHead(Attention):
    """Every query head has keys and values of its own (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, heads, position)


class MultiQuery(Attention):
    """All query heads share one head of keys and values (Shazeer 2019, arXiv:1911.02150)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, 1, position)
