"""Attention maps of the model in training, on held-out text, for `evaluation.attention_maps`, and
the states of its recurrent layers.

All ranks call it together. Where ranks share a row, queries and keys are gathered before they are
weighed, so that maps are those of one device whatever the method and the layout; every rank then
has all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from models.analysis.alignments import alignments, memory_reads
from models.analysis.attention_maps import AttentionMap, GatherWhole, collect, leaves, places
from models.analysis.page import attention_page
from models.analysis.state_maps import StateMap, collect_states
from models.micro_batch import MicroBatch
from models.primitive import Primitive
from models.primitives.scan import Scan
from models.primitives.softmax import Softmax
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator, seq_to_heads
from parallel.drivers.scan import StatePassing
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_auto import Auto
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Stream
from trainer.files.safe_files import replace_inside

# The primitive and the drivers that replace it under any parallel.method.
KINDS = (Softmax, Ring, Ulysses, AllGather, Auto)
SCANS = (Scan, StatePassing)
# A picture cannot show more.
LAYERS = 12
HEADS = 8
REPORT = "report"  # folder of a run directory
PAGE = "attention.html"


def attention_maps(
    model: nn.Module, share: BatchSharder, stream: Stream, tokens: int
) -> tuple[list[AttentionMap], int]:
    """Computes the attention maps of the first tokens of the first held-out row.

    A memory begins empty.

    Args:
        model: in evaluation mode.
        share: cuts the row for this rank.
        stream: held-out text.
        tokens: number of tokens; a shorter row gives all that it has.

    Returns:
        (maps of up to HEADS heads of up to LAYERS softmaxes, spread over the depth of the model;
        number of softmaxes left out). Of a recurrent model of two streams the map of its alignment.
        Empty where no softmax of the model sees a whole row.
    """
    micro_batch = share.piece(beginning(stream, tokens))
    if memory_reads(model):
        return [_alignment(model, share, micro_batch)], 0
    softmaxes = leaves(model, KINDS)
    chosen = _chosen(softmaxes)
    if not chosen:
        return [], 0
    maps = collect(
        model,
        chosen,
        micro_batch.tokens,
        micro_batch.span,
        whole=_gather(share),
        heads=HEADS,
        norms=True,
        source=micro_batch.source,
    )
    return maps, len(softmaxes) - len(chosen)


def state_maps(
    model: nn.Module, share: BatchSharder, stream: Stream, tokens: int
) -> list[StateMap]:
    """Computes what recurrent layers keep, write and read, on the tokens of `attention_maps`.

    Args:
        as in attention_maps.

    Returns:
        Maps of up to HEADS heads of up to LAYERS scans, spread over the depth of the model. Empty
        where the model has no scan over a whole row.
    """
    chosen = _chosen(leaves(model, SCANS))
    if not chosen:
        return []
    micro_batch = share.piece(beginning(stream, tokens))
    return collect_states(
        model,
        chosen,
        micro_batch.tokens,
        micro_batch.span,
        whole=_gather(share),
        heads=HEADS,
        source=micro_batch.source,
    )


def _chosen(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns up to LAYERS of some modules, spread over the depth of the model."""
    names = list(modules)
    chosen = {}
    for index in spread_out(len(names), LAYERS):
        chosen[names[index]] = modules[names[index]]
    return chosen


def _gather(share: BatchSharder) -> GatherWhole | None:
    """Returns what gathers a row from all ranks; None where one rank has it."""
    if share.mesh.context.size == 1:
        return None
    return together(Communicator(share.mesh.context.group))


def _alignment(model: nn.Module, share: BatchSharder, micro_batch: MicroBatch) -> AttentionMap:
    """Returns the weights of a recurrent decoder over its source, the same on every rank."""
    assert micro_batch.source is not None, "what reads a memory step by step has a source"
    span = micro_batch.span
    source_span = micro_batch.source.span
    place = None
    if share.mesh.context.size > 1:
        place = source_span.sharding.index(share.mesh.context.rank, len(source_span.doc))
        span = span.sharding.whole
        source_span = source_span.sharding.whole
    weight = alignments(model, micro_batch, place, source_span.shape[1])
    here = places(span, span)
    there = places(source_span, source_span)
    kept = weight.index_select(1, here).index_select(2, there).cpu()
    queries = span.map(lambda column: column[:, here].cpu())
    keys = source_span.map(lambda column: column[:, there].cpu())
    (name,) = memory_reads(model)
    return AttentionMap(name, kept, 1, queries, keys, None, "alignment")


def write_page(
    directory: Path,
    title: str,
    maps: Sequence[AttentionMap],
    states: Sequence[StateMap],
    model: nn.Module,
    stream: Stream,
) -> Path:
    """Writes report/attention.html of a run directory and returns its path.

    Args:
        directory: of the run.
        title: of the page.
        maps: what `attention_maps` returned.
        states: what `state_maps` returned; one of the two is not empty.
        model, stream: that they were given.
    """
    lengths = [each.weight.shape[1] for each in maps if each.streams != "source"]
    lengths += [each.reads.shape[1] for each in states]
    texts, source_texts = token_texts(stream, lengths[0])
    page = attention_page(title, maps, texts, without_map(model), source_texts, states)
    (directory / REPORT).mkdir(parents=True, exist_ok=True)
    return replace_inside(directory, f"{REPORT}/{PAGE}", page)


def token_texts(stream: Stream, tokens: int) -> tuple[list[str], list[str]]:
    """Returns the texts of the tokens that `attention_maps` shows, in the order of its queries, and
    those of their source."""
    batch = beginning(stream, tokens)
    return _texts(batch, stream), [] if batch.source is None else _texts(batch.source, stream)


def _texts(batch: Batch, stream: Stream) -> list[str]:
    is_token = batch.doc[0, :-1] >= 0
    numbers = batch.tokens[0, :-1][is_token].tolist()
    return [stream.tokenizer.decode([number]) or f"<{number}>" for number in numbers]


def without_map(model: nn.Module) -> list[str]:
    """Returns the parts through which tokens reach one another that the page cannot show."""
    softmaxes = leaves(model, (*KINDS, *SCANS))
    covered = {inner for module in softmaxes.values() for inner in module.modules()}
    covered.update(memory_reads(model).values())
    names = []
    for name, module in model.named_modules():
        if isinstance(module, Primitive) and module not in covered and module.needs_driver:
            names.append(f"{name} ({type(module).__name__})")
    return names


def spread_out(count: int, most: int) -> list[int]:
    """Returns up to `most` numbers below `count` at even steps, the first and last included."""
    if count <= most:
        return list(range(count))
    return [round(index * (count - 1) / (most - 1)) for index in range(most)]


def beginning(stream: Stream, tokens: int) -> Batch:
    """Returns the first tokens of the first row of a stream."""
    batch, _ = stream.read(stream.start())
    row = batch.part(0, 1)
    length = tokens + 1  # one more than the model reads, as in every Batch
    return Batch(
        tokens=row.tokens[:, :length],
        doc=row.doc[:, :length],
        pos=row.pos[:, :length],
        role=row.role[:, :length],
        aims=None if row.aims is None else row.aims[:, :length],
        source=None if row.source is None else _sources_of(row.doc[:, :tokens], row.source),
    )


def _sources_of(doc: Tensor, source: Batch) -> Batch:
    """Returns a row of sources as far as it has those of the documents at hand."""
    wanted = (source.doc[0] >= 0) & (source.doc[0] <= int(doc.max()))
    length = int(wanted.nonzero().max()) + 2 if wanted.any() else 1
    return Batch(
        tokens=source.tokens[:, :length],
        doc=source.doc[:, :length],
        pos=source.pos[:, :length],
        role=source.role[:, :length],
    )


def together(communicator: Communicator) -> GatherWhole:
    """Returns the function that gathers a row, in global order, from the shards of all ranks."""
    # Ranges of no heads: with `None` every rank receives all tokens with all heads.
    head_ranges = [(0, 0)] * communicator.size

    def gathered(tensors: Tensors, span: Span) -> list[Tensor]:
        rows = []
        for tensor in tensors:
            in_rank_order = seq_to_heads(tensor, communicator, None, head_ranges)
            rows.append(span.sharding.to_global_order(in_rank_order))
        return rows

    def whole(
        query: Tensors, payload: Tensors, span: Span, kv_span: Span
    ) -> tuple[Tensors, Tensors, Span, Span]:
        whole_query = gathered(query, span)
        whole_payload = gathered(payload, kv_span)
        # Every rank knows the addresses of the whole row already.
        return whole_query, whole_payload, span.sharding.whole, kv_span.sharding.whole

    return whole
