"""Longformer: a window, dilated on some heads, and a few global tokens that all tokens see.

Letters: B rows, T queries, S keys, H heads, G key heads, D head width.
"""

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
        layer, layers: index of this layer, and the number of layers.
        window: tokens seen to one side, the query itself among them; a list gives every layer its
            own (they should grow with depth).
        dilation: a head sees every `dilation`-th token of a window `dilation` times as wide. One
            number for all heads, or a list with one for each.
        first: tokens at the start of each document that are global.
        every: each position divisible by this is global; 0 = none. Tokens with the role GLOBAL
            always are.
        symmetric: look to both sides, for encoders. A decoder trained this way sees its targets.

    A global query reads the global projections of everything it sees; any other query reads the
    ordinary ones, also of global tokens. Two softmaxes with disjoint queries are added, so each
    stays exact under any sharding.

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
        windows = _expand("window", window, layers, "model.layers")
        dilations = _expand("dilation", dilation, heads, "model.heads")
        local = DilatedWindow(windows[layer], tuple(dilations))
        whole = SameDocument() if symmetric else CAUSAL
        global_query = GlobalQuery(first, every)
        super().__init__(
            width,
            heads,
            kv_heads,
            position,
            mask=whole & ~global_query & (local | GlobalKey(first, every)),
        )
        self.global_q = nn.Linear(width, self.q.out_features, bias=False)
        self.global_k = nn.Linear(width, self.k.out_features, bias=False)
        self.global_v = nn.Linear(width, self.v.out_features, bias=False)
        self.global_mix = Softmax(whole & global_query, self.mix.score)

    def stays_local(self) -> str | None:
        """See Layer."""
        return (
            "longformer has a second set of queries and keys, of which a memory would"
            " have to be told"
        )

    def payload(self, hidden: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Ordinary keys and values, then those for global queries; each [B, S, G, D]."""
        global_key = self.global_k(hidden).unflatten(-1, (-1, self.head_width))
        global_value = self.global_v(hidden).unflatten(-1, (-1, self.head_width))
        ordinary = super().payload(hidden, span)
        return *ordinary, self.position.rotate(global_key, span), global_value

    def attend_heads(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, H D]: the sum of both softmaxes; each gives 0 to the queries of the other."""
        params = self.tables() if self.tables is not None else ()
        global_query = self.global_q(hidden).unflatten(-1, (-1, self.head_width))
        global_query = self.position.rotate(global_query, span)
        global_output = self.global_mix(
            (global_query,), payload[2:], params, span=span, kv_span=kv_span
        )
        return super().attend_heads(hidden, span, payload[:2], kv_span) + global_output.flatten(-2)


def _expand(name: str, value: int | Sequence[int], count: int, owner: str) -> list[int]:
    """One value for each of `count` layers or heads, from a single value or a list.

    Raises:
        ValueError: the list has another length.
    """
    if isinstance(value, int):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise ValueError(
            f"{name} lists {len(values)} values for {owner}={count}; give {count}, or a single"
            " one for all"
        )
    return values
