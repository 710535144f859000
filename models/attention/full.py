"""Grouped-query attention: several query heads share a head of keys and values.

Letters: B rows, T queries, S keys, H query heads, G key heads, D head width.
"""

from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.masks.algebra import Mask
from models.masks.basic import Causal, SameDocument
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.ranges import Count
from models.span import Span

CAUSAL = Causal() & SameDocument()


class Attention(SplitAttention):
    """Projects, rotates, attends and projects back; causal within a document by default.

    Args:
        width: channels of input and output.
        heads: query heads; they divide width.
        kv_heads: key and value heads; they divide heads. heads: multi-head, 1: multi-query
            attention.
        position: how queries and keys learn their positions.
        mask: which keys a query sees.
        head_width: channels of a head; null: width / heads.
        bias: of the projections to queries, keys and values.
        out_bias: of the projection back.

    Attributes:
        beside: a memory that adds what it remembers to the output: (q [B, T, H, D], k and v
            [B, T, G, D], all without positions, output [B, T, H, D], span) -> output; or None.

    Source: Ainslie et al. 2023 (arXiv:2305.13245); multi-query Shazeer 2019 (arXiv:1911.02150).
    """

    beside: nn.Module | None

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        *,
        mask: Mask = CAUSAL,
        head_width: Count | None = None,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        if head_width is None and width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        if heads % kv_heads:
            raise ValueError(
                f"model.kv_heads={kv_heads} does not divide model.heads={heads}; choose a divisor"
                f" of {heads}"
            )
        self.head_width = width // heads if head_width is None else head_width
        self.position = position
        self.q = nn.Linear(width, heads * self.head_width, bias=bias)
        self.k = nn.Linear(width, kv_heads * self.head_width, bias=bias)
        self.v = nn.Linear(width, kv_heads * self.head_width, bias=bias)
        self.out = nn.Linear(heads * self.head_width, width, bias=out_bias)
        score, self.tables = position.score(heads, self.head_width)
        self.mix = Softmax(mask, score)
        # registered as a module so that a memory set later joins the state dict
        self.register_module("beside", None)

    def project_query(self, hidden: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, H, D], before the position rotates it."""
        return self.q(hidden).unflatten(-1, (-1, self.head_width))

    def project_payload(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D], before the position rotates the keys."""
        key = self.k(hidden).unflatten(-1, (-1, self.head_width))
        value = self.v(hidden).unflatten(-1, (-1, self.head_width))
        return key, value

    def payload(self, hidden: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Keys and values [B, S, G, D]; if there is a memory, also the keys without positions."""
        key, value = self.project_payload(hidden)
        rotated_key = self.position.rotate(key, span)
        if self.beside is None:
            return rotated_key, value
        return rotated_key, value, key

    def attend_heads(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: the weighted mean of values of each head of each token."""
        params = self.tables() if self.tables is not None else ()
        query = self.project_query(hidden)
        rotated_query = self.position.rotate(query, span)
        output = self.mix((rotated_query,), payload[:2], params, span=span, kv_span=kv_span)
        if self.beside is not None:
            # the payload may begin with tokens of earlier rows, which the memory has already seen
            tokens = hidden.shape[1]
            value = payload[1][:, payload[1].shape[1] - tokens :]
            key = payload[2][:, payload[2].shape[1] - tokens :]
            output = self.beside(query, key, value, output, span)
        return output.flatten(-2)

    def attend(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given keys and values of the tokens of `kv_span`."""
        return self.out(self.attend_heads(hidden, span, payload, kv_span))


class MultiHead(Attention):
    """Every query head has keys and values of its own (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, heads, position)


class MultiQuery(Attention):
    """All query heads share one head of keys and values (Shazeer 2019, arXiv:1911.02150)."""

    def __init__(self, width: int, heads: int, position: Position):
        super().__init__(width, heads, 1, position)
