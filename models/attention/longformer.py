"""Longformer: a window, dilated on some heads, and a few global tokens that see all and are seen by
all."""

from collections.abc import Sequence

from torch import Tensor, nn

from models.attention.full import CAUSAL, Attention
from models.masks.basic import SameDocument
from models.masks.roles import GlobalKey, GlobalQuery
from models.masks.sparse import DilatedWindow
from models.positions.base import Position
from models.primitives.softmax import Softmax
from models.span import Span


class Longformer(Attention):
    """Windowed attention in which global tokens have queries, keys and values of their own.

    Args:
        width, heads, kv_heads, position: as in Attention.
        layer, layers: which layer this is, of how many.
        window: tokens seen to one side, oneself among them; a list gives every layer its own (they
            should grow with depth).
        dilation: the window of a head has holes: it sees every gap-th token, and reaches gap times
            as far. One for all heads, or a list with one for each.
        first: tokens at the start of each document that are global.
        every: each position that this divides is global; 0 = none. Tokens with the role GLOBAL
            always are.
        symmetric: look to both sides. A decoder trained so sees its targets: it is meant for
            encoders.

    A query that is global reads the global projections of everything it sees; any other query reads
    the ordinary ones, also of global tokens. Two softmaxes, each blind where the other sees, are
    added: so each stays exact under any cut.

    Source: Beltagy et al. 2020 (arXiv:2004.05150). Theirs starts the global projections as copies
    of pretrained local ones; ours start at random like the rest.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        position: Position,
        layer: int,
        layers: int,
        *,
        window: int | Sequence[int],
        dilation: int | Sequence[int] = 1,
        first: int = 1,
        every: int = 0,
        symmetric: bool = False,
    ):
        reaches = _each("window", window, layers, "model.layers")
        near = DilatedWindow(
            reaches[layer], tuple(_each("dilation", dilation, heads, "model.heads"))
        )
        whole = SameDocument() if symmetric else CAUSAL
        to_all = GlobalQuery(first, every)
        super().__init__(
            width,
            heads,
            kv_heads,
            position,
            mask=whole & ~to_all & (near | GlobalKey(first, every)),
        )
        self.global_q = nn.Linear(width, self.q.out_features, bias=False)
        self.global_k = nn.Linear(width, self.k.out_features, bias=False)
        self.global_v = nn.Linear(width, self.v.out_features, bias=False)
        self.global_mix = Softmax(whole & to_all, self.mix.score)

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Ordinary keys and values, then those that global queries read; each [B, S, G, D]."""
        k, v = (
            project(x).unflatten(-1, (-1, self.head_width))
            for project in (self.global_k, self.global_v)
        )
        return *super().payload(x, span), self.position.rotate(k, span), v

    def attend_heads(
        self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: each softmax gives 0 to queries that are the other one's business."""
        params = self.tables() if self.tables is not None else ()
        q = self.position.rotate(self.global_q(x).unflatten(-1, (-1, self.head_width)), span)
        whole = self.global_mix((q,), payload[2:], params, span=span, kv_span=kv_span).flatten(-2)
        return super().attend_heads(x, span, payload[:2], kv_span) + whole


def _each(name: str, value: int | Sequence[int], count: int, kv_span: str) -> list[int]:
    """One value for each of `count`, from one for all or a list."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(
            f"{name} lists {len(values)} values for {kv_span}={count}; give {count}, or a single"
            " one for all"
        )
    return values
