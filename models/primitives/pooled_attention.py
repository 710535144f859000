"""Attention between the tokens of a document and a few points that stand for all of it.

`PooledAttention` lets points read tokens, `PointAttention` lets tokens, or points, read points. A
point is a learned vector, one copy for each document; where rows are sharded, every rank has all
points and computes the same ones. The primitives have no parameters.

Letters: B rows, T tokens, D documents of a row (the most of any), M points of a document, N = D M,
H heads, E value width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.masks.basic import SameDocument
from models.plans import planned
from models.primitive import Primitive
from models.primitives.attention_tape import AttentionReplay
from models.primitives.softmax import LocalAttention, attention_spec
from models.scores import Score, Tensors
from models.span import PADDING, Span, to_device

SAME_DOCUMENT = SameDocument()


@dataclass(frozen=True)
class Points:
    """Addresses of the points of all documents of some rows.

    Attributes:
        span: [B, N], the points of a row's first document, then those of its second, and so on;
            padding where a row has fewer documents than another.
        document: [B, T] int64, the place of each token's document in its row; 0 for padding.
        count: M.
    """

    span: Span
    document: Tensor
    count: int

    def copies(self, vectors: Tensor) -> Tensor:
        """[M, ...] -> [B, N, ...]: the vectors, once for each document."""
        rows, total = self.span.shape
        documents = total // self.count
        return vectors.expand(rows, documents, *vectors.shape).flatten(1, 2)


@planned
def points_of(span: Span, whole: Span, count: int) -> Points:
    """Gives every document of the rows `count` points.

    Args:
        span: addresses [B, T] of the tokens at hand.
        whole: addresses [B, T'] of all tokens of the rows, in any order.
    """
    return span.cache.get(("points", count), lambda: _points(span, whole, count), whole)


def _points(span: Span, whole: Span, count: int) -> Points:
    # Listed on the host: a device would have to be asked how many there are.
    documents = _listed(whole.doc if whole.doc.is_meta else whole.host().doc)
    device = span.pos.device
    rows, most = documents.shape
    order = torch.arange(count, device=documents.device).repeat(rows, most)
    address = Span.of(order, documents.repeat_interleave(count, 1))
    if not documents.is_meta:
        address = address.moved(lambda tensor: to_device(tensor, device))
    # Padding sorts before all documents: the search wants it behind them.
    rising = documents.masked_fill(documents == PADDING, torch.iinfo(torch.int64).max)
    place = torch.searchsorted(to_device(rising, device), span.doc.contiguous())
    return Points(address, place.clamp_max(most - 1), count)


def _listed(doc: Tensor) -> Tensor:
    """[B, T] -> [B, D]: the documents of each row, rising, then PADDING."""
    # Values are not known on the meta device; a row is then taken for one document.
    if doc.is_meta:
        return doc[:, :1]
    rising = doc.sort(1).values
    opens = rising != PADDING
    opens[:, 1:] &= rising[:, 1:] != rising[:, :-1]
    most = max(1, int(opens.sum(1).max())) if opens.numel() else 1
    # What opens no document goes to a column behind the last, which is cut off.
    column = torch.where(opens, opens.cumsum(1) - 1, most)
    listed = doc.new_full((len(doc), most + 1), PADDING)
    return listed.scatter(1, column, rising)[:, :most]


class PooledAttention(Primitive):
    """Attention of points over all tokens of their document."""

    mask = SAME_DOCUMENT

    def __init__(self, score: Score | None = None):
        super().__init__()
        self.score = score or Score()
        self.kept = AttentionReplay()

    def points(self, span: Span, count: int) -> Points:
        """Returns the points of the documents of whole rows; see `points_of`."""
        return points_of(span, span, count)

    def forward(self, query: Tensors, payload: Tensors, *, span: Span, kv_span: Span) -> Tensor:
        """Returns the means over the tokens of each point's document, [B, N, H, E].

        Args:
            query: (q [B, N, H, D],) of the points, the same on every rank.
            payload: (k, v) [B, T, H, D or E] of the tokens at hand.
            span: addresses of the points.
            kv_span: addresses of the tokens.
        """
        return local_attention(self, query, payload, span, kv_span)


class PointAttention(Primitive):
    """Attention over the points of one's own document, which every rank has."""

    mask = SAME_DOCUMENT
    needs_driver = False

    def __init__(self, score: Score | None = None):
        super().__init__()
        self.score = score or Score()
        self.kept = AttentionReplay()

    def forward(self, query: Tensors, payload: Tensors, *, span: Span, kv_span: Span) -> Tensor:
        """Returns the means over the points of each query's document, [B, T, H, E].

        Args:
            query: (q [B, T, H, D],) of the tokens at hand, or of points.
            payload: (k, v) [B, N, H, D or E] of all points.
            span: addresses of the queries.
            kv_span: addresses of the points.
        """
        return local_attention(self, query, payload, span, kv_span)


def local_attention(
    leaf: PooledAttention | PointAttention,
    query: Tensors,
    payload: Tensors,
    span: Span,
    kv_span: Span,
) -> Tensor:
    """Returns the attention of a leaf over the keys at hand, [B, T, H, E]."""
    spec = attention_spec(leaf.mask, leaf.score, query, None)
    mean, _ = LocalAttention.apply(
        spec, leaf.kept, span, kv_span, len(query), len(payload), *query, *payload
    )
    return mean
