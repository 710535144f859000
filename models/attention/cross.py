"""Cross-attention: queries from one sequence, keys and values from another of any length."""

from torch import Tensor, nn

from models.masks.algebra import Mask
from models.masks.basic import SameDocument
from models.primitives.softmax import Softmax
from models.span import Span

SOURCE = SameDocument()


class CrossAttention(nn.Module):
    """Every token sees the whole of its document's source: the source's tokens of the same row and
    document number.

    Args:
        width: of what comes in and goes out.
        heads: query heads; they divide width.
        kv_heads: key and value heads; they divide heads.
        source_width: of the source's tokens; `width` by default.
        mask: between a token's address and a source token's.

    There are no positions: two sequences share no axis, and a source carries its own in its
    content. A document without a source gets zeros. Over ranks, the sequence and its source are cut
    each by its own layout, over the same ranks. Source: Vaswani et al. 2017 (arXiv:1706.03762),
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
        of_source = source_width or width
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(of_source, kv_heads * self.head_width, bias=False)
        self.v = nn.Linear(of_source, kv_heads * self.head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mix = Softmax(mask)

    def forward(self, x: Tensor, span: Span, source: Tensor, source_span: Span) -> Tensor:
        """x [B, T, width], source [B, S, source_width] -> [B, T, width]."""
        return self.attend(x, span, self.remember(source), source_span)

    def remember(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, G, D] of a source: computed once, they serve a whole decode."""
        k, v = (
            project(source).unflatten(-1, (-1, self.head_width)) for project in (self.k, self.v)
        )
        return k, v

    def attend(
        self, x: Tensor, span: Span, memory: tuple[Tensor, Tensor], source_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given what `remember` made of the source."""
        q = self.q(x).unflatten(-1, (-1, self.head_width))
        return self.out(self.mix((q,), memory, span=span, kv_span=source_span).flatten(-2))
