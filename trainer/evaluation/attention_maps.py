"""Attention maps of the model in training, on held-out text: what `evaluation.attention_maps`
draws. All ranks call it together.

Where ranks share a row, the hooks of a leaf's driver bring queries and keys together before they
weigh them, so that maps are those of one device whatever the method and the layout; every rank then
has all of them.
"""

from torch import nn

from models.analysis.attention_maps import AttentionMap, GatherWhole, collect, leaves
from models.primitives.softmax import Softmax
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, seq_to_heads
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_auto import Auto
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Stream

KINDS = (
    Softmax,
    Ring,
    Ulysses,
    AllGather,
    Auto,
)  # what is called as a Softmax is, under any parallel.method
# the most that a picture can show
LAYERS = 12
HEADS = 8


def attention_maps(
    model: nn.Module, share: BatchSharder, stream: Stream, tokens: int
) -> tuple[list[AttentionMap], int]:
    """Of the first tokens of the first held-out row: up to 8 heads of up to 12 softmaxes, spread
    over the depth of the model.

    With them, how many softmaxes were left out. Empty where none of the model sees a whole row. A
    memory begins empty.

    Args:
        model: in evaluation mode.
        tokens: how many; a row that has fewer gives all.
    """
    watched = leaves(model, KINDS)
    chosen = dict(list(watched.items())[span] for span in spread_out(len(watched), LAYERS))
    if not chosen:
        return [], 0
    piece = share.piece(beginning(stream, tokens))
    whole = (
        together(Communicator(share.mesh.context.group)) if share.mesh.context.size > 1 else None
    )
    found = collect(model, chosen, piece.tokens, piece.span, whole=whole, heads=HEADS)
    return found, len(watched) - len(chosen)


def spread_out(count: int, most: int) -> list[int]:
    """Numbers below `count`, `most` of them or all: the first, the last, and others at even
    steps."""
    if count <= most:
        return list(range(count))
    return [round(span * (count - 1) / (most - 1)) for span in range(most)]


def beginning(stream: Stream, tokens: int) -> Batch:
    """The first tokens of the first row of a stream."""
    batch, _ = stream.read(stream.start())
    row = batch.part(0, 1)
    cut = [None if each is None else each[:, : tokens + 1] for each in row]
    return Batch(*cut)  # type: ignore[arg-type]


def together(communicator: Communicator) -> GatherWhole:
    """From the part of a row that a rank holds to the row in global order, on every rank; addresses
    are known already."""
    every = [(0, 0)] * communicator.size

    def whole(
        query: Tensors, payload: Tensors, span: Span, kv_span: Span
    ) -> tuple[Tensors, Tensors, Span, Span]:
        asking = [
            span.sharding.to_global_order(seq_to_heads(t, communicator, None, every)) for t in query
        ]
        seen = [
            kv_span.sharding.to_global_order(seq_to_heads(t, communicator, None, every))
            for t in payload
        ]
        return asking, seen, span.sharding.whole, kv_span.sharding.whole

    return whole
