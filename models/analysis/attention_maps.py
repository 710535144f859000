"""Attention maps: the weight that every head of every softmax gives to each key it may see, for one
short row.

A weight says where a mean was taken, not why an answer came out: a key with a small value may hold
a large weight.

Letters: B rows, H heads, T queries, S keys.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.causality import source_modules
from models.kernels import reference
from models.masks.algebra import visible
from models.micro_batch import MicroBatch
from models.primitives.sequential import sequential_modules
from models.primitives.softmax import Softmax, add_sink, attention_spec
from models.scores import Tensors
from models.span import Span

# (query, payload, addresses of both) as they lie at a leaf -> the same of the whole row
GatherWhole = Callable[[Tensors, Tensors, Span, Span], tuple[Tensors, Tensors, Span, Span]]

# A row reads itself, its source reads itself, or the row reads its source.
MapStreams = Literal["row", "source", "alignment"]


class AttentionMap(NamedTuple):
    """The weights of one softmax in one pass.

    Attributes: name: of the leaf in the model; where it is called again in the same pass, " (2)", "
        (3)", ... after it. weight: [H, T, S] of at least float32, on the CPU; all heads, or the
        first ones. A row sums to 1, to 1 less the share
            of a learned sink, or to 0 where nothing is seen.
        heads: how many there are, kept or not.
        at: [1, T] addresses of the queries. of: [1, S] of the keys: those of the row first, then
            what stands for several of its tokens or repeats them (block summaries, what a memory
            holds), each part in order. No padding among them.
        value_norm: [H, S] length of what each key would add to the residual stream with a weight of
            1: of its value after the output projection where the layer has one, else of the value;
            None where it was not asked for.
        streams: what the queries and the keys belong to.
    """

    name: str
    weight: Tensor
    heads: int
    span: Span
    kv_span: Span
    value_norm: Tensor | None = None
    streams: MapStreams = "row"


def attention_weights(
    leaf: Softmax,
    query: Tensors,
    payload: Tensors,
    params: Tensors = (),
    *,
    span: Span,
    kv_span: Span | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """[B, H, T, S], wide: what each key counts in the mean that the leaf gives for the same
    arguments.

    Exact under every mask and score, from the general tile's logits; it holds all of them at once,
    so rows must be short.
    """
    kv_span = span if kv_span is None else kv_span
    heads = attention_spec(leaf.mask, leaf.score, query, heads).heads
    total = reference.forward(leaf.score, leaf.mask, query, payload, params, span, kv_span, heads)
    add_sink(leaf.score, params, total)
    wide = reference.accumulation_dtype(query[0].dtype)
    query, payload, params = ([t.to(wide) for t in some] for some in (query, payload, params))
    logits = leaf.score.logits(query, payload, params, span, kv_span, heads)
    logits = logits.masked_fill(~visible(leaf.mask, span, kv_span, heads), -torch.inf)
    return (logits - reference.finite_lse(total[1]).transpose(1, 2)[..., None]).exp()


def leaves(
    model: nn.Module, kinds: tuple[type[nn.Module], ...] = (Softmax,)
) -> dict[str, nn.Module]:
    """By name: every module that is called as a Softmax is, and stands in no other such.

    Left out is what runs inside the steps of a Relay (the layers of memory=tokens): it sees a
    segment at a time, no row.

    Args:
        kinds: Softmax, and what may stand in its place with the leaf inside it.
    """
    inside = sequential_modules(model)
    found = {}
    taken = set()
    for name, module in model.named_modules():
        if isinstance(module, kinds) and module not in inside and module not in taken:
            found[name] = module
            taken.update(module.modules())
    return found


@torch.no_grad()
def collect(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    tokens: Tensor,
    span: Span,
    *,
    whole: GatherWhole | None = None,
    heads: int | None = None,
    norms: bool = False,
    source: Any = None,
) -> list[AttentionMap]:
    """The maps of one row, in the order in which the leaves are called.

    Args:
        model: called with (tokens, span). Best in evaluation mode; it is left as it was.
        watched: some of what `leaves` names.
        tokens: [1, T] int64, or where the row is cut, the part of it at hand.
        whole: brings together what lies on several ranks, called once for each call of a leaf, in
            the same order everywhere; None: the row is at hand.
        heads: keep the first so many of each leaf; None: all.
        norms: whether maps hold the norms of values.
        source: a MicroBatch that the model reads beside the row; None: it reads none.
    """
    found: list[AttentionMap] = []
    of_source = source_modules(model)

    def note(
        name: str,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        **rest: Any,
    ) -> None:
        leaf = _leaf(watched[name])
        inner_span = rest["span"]
        kv_span = rest["span"] if rest.get("kv_span") is None else rest["kv_span"]
        streams = _streams(inner_span, span) if watched[name] in of_source else "row"
        if whole is not None:
            query, payload, inner_span, kv_span = whole(query, payload, inner_span, kv_span)
        weight = attention_weights(
            leaf, query, payload, params, span=inner_span, kv_span=kv_span, heads=rest.get("heads")
        )[0]
        here = places(inner_span, inner_span)
        there = places(kv_span, inner_span)
        kept = weight[:heads].index_select(1, here).index_select(2, there).cpu()
        addresses = (
            each.map(lambda t, some=some: t[:, some].cpu())
            for each, some in ((inner_span, here), (kv_span, there))
        )
        norm = None
        if norms:
            projection = output_projection(model, name)
            norm = value_norms(leaf, query, payload, params, len(weight), projection)
            norm = norm[:heads].index_select(1, there).cpu()
        made = AttentionMap(name, kept, len(weight), *addresses, value_norm=norm, streams=streams)
        found.append(made._replace(name=_numbered(name, found)))

    with hooked(watched, note), uncompiled():
        model(MicroBatch(tokens, span, None, source))
    return found


def _streams(queries: Span, row: Span) -> MapStreams:
    """Returns what the queries of a layer that reads the source belong to."""
    return "alignment" if queries is row else "source"


@contextmanager
def hooked(watched: Mapping[str, nn.Module], note: Callable[..., None]) -> Iterator[None]:
    """Calls `note` with the name and the arguments of each call of a watched module."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: note(name, *args, **kwargs)

    handles = []
    for name, module in watched.items():
        handles.append(module.register_forward_pre_hook(hook(name), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def value_norms(
    leaf: Softmax,
    query: Tensors,
    payload: Tensors,
    params: Tensors,
    heads: int,
    projection: nn.Linear | None,
) -> Tensor:
    """[H, S]: the norm of each key's value in the first row, after the output projection.

    Source: Kobayashi et al. 2020 (arXiv:2004.10102); a bias of the output counts to no key.
    """
    _, _, value = leaf.score.operands(query, payload, params)
    value = value[0].to(reference.accumulation_dtype(value.dtype))
    value = value.repeat_interleave(heads // value.shape[1], 1)  # [S, H, E]
    if projection is None or projection.in_features != heads * value.shape[2]:
        return value.norm(dim=-1).T
    weight = projection.weight.to(value.dtype).unflatten(1, (heads, value.shape[2]))
    return torch.einsum("she,whe->hsw", value, weight).norm(dim=-1)


def output_projection(model: nn.Module, name: str) -> nn.Linear | None:
    """The layer `out` beside a leaf, which takes what its heads give; None where there is none."""
    found = getattr(model.get_submodule(name.rpartition(".")[0]), "out", None)
    return found if isinstance(found, nn.Linear) else None


def _numbered(name: str, maps: list[AttentionMap]) -> str:
    """Returns the name of a leaf, with the number of the call where it is called again."""
    times = sum(earlier.name.partition(" ")[0] == name for earlier in maps)
    return f"{name} ({times + 1})" if times else name


def uncompiled() -> AbstractContextManager:
    """Compiled blocks run as they were written: they may not see hooks that came later, and one row
    is not worth compiling."""
    compiles = (
        "torch._dynamo" in sys.modules
    )  # which is slow to import, and has been where anything was compiled
    return torch.compiler.set_stance("force_eager") if compiles else nullcontext()


def _leaf(module: nn.Module) -> Softmax:
    """The leaf that a module is, or stands in for."""
    return next(inner for inner in module.modules() if isinstance(inner, Softmax))


def places(span: Span, row: Span) -> Tensor:
    """[S] int64: where the tokens of a span lie that are no padding, those with a role that tokens
    of the row have first."""
    doc, pos, role = (each[0].tolist() for each in (span.doc, span.pos, span.role))
    roles = set(row.role[row.valid()].tolist())
    there = [place for place, valid in enumerate(span.valid()[0].tolist()) if valid]
    there.sort(key=lambda place: (role[place] not in roles, doc[place], pos[place], role[place]))
    return torch.tensor(there, dtype=torch.long, device=span.pos.device)
