"""Cross-attention: queries from one sequence, keys and values from another of any length.

Letters: B rows, T queries, S source tokens, G key heads, D head width.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from models.layer import Layer
from models.masks.algebra import Mask
from models.masks.basic import SameDocument
from models.primitives.softmax import Softmax
from models.ranges import Count, Positive
from models.scores import Score
from models.span import Span

SOURCE = SameDocument()


class CrossAttention(Layer):
    """Attends to the whole source of a token's document: equal row and equal document number.

    Args:
        width: channels of input and output.
        heads: query heads; they divide width.
        kv_heads: key and value heads; they divide heads.
        source_width: channels of the source's tokens; `width` by default.
        mask: between a token's address and a source token's.
        head_width: channels of a head; None: width / heads.
        scale: factor of the dot products; None: 1 / sqrt(head_width).
        bias: of the projections to queries, keys and values.
        out_bias: of the projection back.

    There are no positions: two sequences share no axis, and a source has its own in its content. A
    document without a source gets zeros. With context parallelism, the sequence and its source are
    sharded by separate layouts over the same ranks. Source: Vaswani et al. 2017 (arXiv:1706.03762),
    section 3.2.3.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        source_width: int | None = None,
        mask: Mask = SOURCE,
        head_width: Count | None = None,
        scale: Positive | None = None,
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
        source_width = source_width or width
        self.q = nn.Linear(width, heads * self.head_width, bias=bias)
        self.k = nn.Linear(source_width, kv_heads * self.head_width, bias=bias)
        self.v = nn.Linear(source_width, kv_heads * self.head_width, bias=bias)
        self.out = nn.Linear(heads * self.head_width, width, bias=out_bias)
        # Every call brings the whole source: nothing is held from one token to the next.
        self.mix = Softmax(mask, Score(scale), extends=False)

    def source_parts(self) -> Iterable[nn.Module]:
        """See Layer."""
        return self.k, self.v, self.mix

    def forward(self, hidden: Tensor, span: Span, source: Tensor, source_span: Span) -> Tensor:
        """hidden [B, T, width], source [B, S, source_width] -> [B, T, width]."""
        return self.attend(hidden, span, self.remember(source), source_span)

    def remember(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D] of a source; computed once, they serve a whole decode."""
        key = self.k(source).unflatten(-1, (-1, self.head_width))
        value = self.v(source).unflatten(-1, (-1, self.head_width))
        return key, value

    def attend(
        self, hidden: Tensor, span: Span, memory: tuple[Tensor, Tensor], source_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given the keys and values that `remember` returned."""
        query = self.q(hidden).unflatten(-1, (-1, self.head_width))
        output = self.mix((query,), memory, span=span, kv_span=source_span)
        return self.out(output.flatten(-2))
