"""Grouped-query attention with every option of the field's decoders, in any combination.

Letters: B rows, T queries, S keys, H query heads, G key heads, D head width.
"""

from typing import Literal

from torch import Tensor, nn

from models.attention.bidirectional import BOTH_SIDES
from models.attention.full import CAUSAL, Attention
from models.attention.sink_logit import TablesWithSink
from models.masks.algebra import Mask
from models.masks.basic import SameDocument, SlidingWindow
from models.norms import OffsetRMSNorm, RMSNorm
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.ranges import Count, Positive
from models.scores import Score, SinkScore, SoftcapScore
from models.span import Span


class HubAttention(Attention):
    """Attention within a document, causal or not, as a config.json describes it.

    The options are those of the catalogue's mixers, and so are the names of the parameters: with
    none set this is `full`, with `window` it is `sliding`, with `qk_norm` it is `qk_norm`.

    Args:
        width, heads, kv_heads, position, head_width, bias, out_bias: as in Attention.
        window: see only the last `window` tokens, oneself among them; null: all earlier ones.
        scale: factor of the dot products; null: 1 / sqrt(head width).
        cap: bends logits into (-cap, cap); null: they are not bent.
        qk_norm: norm of each head's queries and keys before rotation: rms, or rms_offset with a
            gain of 1 + weight; null: none.
        qk_norm_eps: added to their mean square.
        sink: a learned logit per head for a key without a value.
        gate: multiply every channel that the heads give by sigmoid(W x), before `out`.
        causal: false shows a token its whole document, as in an encoder.

    Source: Mistral 7B (arXiv:2310.06825), Gemma 2 and 3 (arXiv:2408.00118, arXiv:2503.19786),
    Qwen 3 (arXiv:2505.09388), gpt-oss (arXiv:2508.10925), gates as in Qwen3-Next
    (arXiv:2505.06708).
    """

    gate: nn.Module | None

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        *,
        head_width: Count | None = None,
        bias: bool = False,
        out_bias: bool = False,
        window: Count | None = None,
        scale: Positive | None = None,
        cap: Positive | None = None,
        qk_norm: Literal["rms", "rms_offset"] | None = None,
        qk_norm_eps: Positive = 1e-6,
        sink: bool = False,
        gate: bool = False,
        causal: bool = True,
    ):
        mask = _mask(window, causal)
        super().__init__(
            width,
            heads,
            kv_heads,
            position,
            mask=mask,
            head_width=head_width,
            bias=bias,
            out_bias=out_bias,
        )
        self.causal = causal
        score = self.mix.score
        if scale is not None:
            # An exact type: every subclass of Score adds something to the dot products.
            if type(score) is not Score:
                raise ValueError(
                    f"scale={scale} is for plain dot products, but {type(position).__name__} shapes"
                    " the scores; use position=rope"
                )
            score = Score(scale)
        if cap is not None:
            score = SoftcapScore(score, cap)
        if sink:
            score = SinkScore(score)
            self.tables = TablesWithSink(self.tables, heads)
        self.mix = Softmax(mask, score)
        inner_width = heads * self.head_width
        self.register_module("gate", nn.Linear(width, inner_width, bias=bias) if gate else None)
        self.register_module("q_norm", None)
        self.register_module("k_norm", None)
        if qk_norm is not None:
            kind = RMSNorm if qk_norm == "rms" else OffsetRMSNorm
            self.q_norm = kind(self.head_width, eps=qk_norm_eps)
            self.k_norm = kind(self.head_width, eps=qk_norm_eps)

    def stays_local(self) -> str | None:
        """See Layer."""
        return None if self.causal else BOTH_SIDES

    def project_query(self, hidden: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, H, D], normed where that was asked for."""
        query = super().project_query(hidden)
        return query if self.q_norm is None else self.q_norm(query)

    def project_payload(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Keys, normed where that was asked for, and values [B, S, G, D]."""
        key, value = super().project_payload(hidden)
        return (key if self.k_norm is None else self.k_norm(key)), value

    def attend_heads(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: the output of all heads, times the gate where there is one."""
        output = super().attend_heads(hidden, span, payload, kv_span)
        return output if self.gate is None else output * self.gate(hidden).sigmoid()


def _mask(window: int | None, causal: bool) -> Mask:
    """Returns what a query sees."""
    if window is None:
        return CAUSAL if causal else SameDocument()
    if not causal:
        raise ValueError(
            f"window={window} counts tokens before a query, and causal=false shows those after it"
            " too; leave one of the two out"
        )
    return CAUSAL & SlidingWindow(window)
