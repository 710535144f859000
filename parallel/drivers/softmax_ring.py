"""Ring attention: queries stay, keys and values rotate over the ranks, partial attentions merge.

Source: Liu et al. 2023 (arXiv:2310.01889). Ours differs in three ways: one autograd function around
the whole exchange saves only what is local and sends the payload round again in backward; any
payload of a score rotates (latents, keys and values, gates); blocks travel in parts
(parallel/key_parts.py), each passed on before it is computed.

In backward most of a rank's own keys come last, so that gradients come home after size - 1 hops,
and while they do there is something to compute; a share of them comes first, while the first part
of another rank's keys is on its way.

Letters: B rows, T queries, H heads, E value width.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.kernels import blockwise
from models.kernels.reference import Partial
from models.primitives.attention_tape import AttentionReplay
from models.primitives.softmax import (
    Softmax,
    add_sink,
    attention_spec,
    incoming_gradients,
    sink_gradient,
    split_tensors,
    value_width,
)
from models.scores import Score, Tensors
from models.span import Span
from parallel.collectives import Communicator, Pending
from parallel.key_parts import KeyPart, key_parts, split_own


class Ring(nn.Module):
    """Replaces a Softmax whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: Softmax, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    @property
    def score(self) -> Score:
        """Score function of the attention."""
        return self.core.score

    def forward(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors = (),
        *,
        span: Span,
        kv_span: Span | None = None,
        heads: Tensor | None = None,
    ) -> Tensor:
        """Runs Softmax.forward over every rank's keys.

        `span.sharding` (and `kv_span.sharding`) say which rank holds which tokens.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span, kv_span=kv_span, heads=heads)
        spec = attention_spec(self.core.mask, self.core.score, query, heads)
        if kv_span is None:
            kv_span = span
        if span.past is not None:
            payload, kv_span = span.past.hold(self.core, payload, kv_span)
        return _Ring.apply(
            spec,
            self.core.kept,
            self.communicator,
            span,
            kv_span,
            len(query),
            len(payload),
            *query,
            *payload,
            *params,
        )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: blockwise.AttentionSpec,
        replay: AttentionReplay,
        communicator: Communicator,
        span: Span,
        kv_span: Span,
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = split_tensors(tensors, queries, payloads)

        def compute() -> Partial:
            width = value_width(spec.score, payload, params, query)
            total = blockwise.empty_partial(query, len(spec.heads), width)
            sharding = kv_span.sharding

            def attend(block: Tensors, source_span: Span) -> None:
                blockwise.forward(spec, query, block, params, span, source_span, total)

            parts = key_parts(payload)
            arriving = _first_hop(communicator, payload, parts, "ring")
            for share in split_own(parts):
                # As backward cuts them, so that both need the same plans of blocks.
                if share.tokens:
                    attend(share.of(payload), share.of_span(sharding.spans[communicator.rank]))
            for step in range(1, communicator.size):
                source = (communicator.rank - step) % communicator.size
                for part in parts:
                    block = arriving.popleft().wait()
                    if step < communicator.size - 1:
                        # Passed on before it is computed, for the next rank waits for it.
                        arriving.append(communicator.ring_shift(block, "ring"))
                    attend(block, part.of_span(sharding.spans[source]))
            add_sink(spec.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        # Under selective checkpointing the recorded result is replayed: a second forward must not
        # send the keys round once more.
        output, lse = replay.replay_or_compute(compute)
        ctx.spec = spec
        ctx.communicator = communicator
        ctx.spans = (span, kv_span)
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(output, lse, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        communicator = ctx.communicator
        span, kv_span = ctx.spans
        output, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], None, output, lse)
        gradients = blockwise.Gradients.zeros(query, (), params)

        def differentiate(block: Tensors, part: KeyPart, source: int) -> list[Tensor]:
            """Returns the gradients of these keys; those of queries and parameters are added up."""
            into = gradients.with_keys(block)
            blockwise.backward(
                ctx.spec,
                query,
                block,
                params,
                span,
                part.of_span(kv_span.sharding.spans[source]),
                d_out=d_out,
                total=total,
                delta=delta,
                into=into,
            )
            return into.payload

        rank = communicator.rank
        parts = key_parts(payload)
        early, late = split_own(parts)
        arriving = _first_hop(communicator, payload, parts, "ring backward")
        own_early = differentiate(early.of(payload), early, rank) if early.tokens else []
        returning: deque[Pending] = deque()
        for step in range(1, communicator.size):
            for part in parts:
                block = arriving.popleft().wait()
                if step < communicator.size - 1:
                    arriving.append(communicator.ring_shift(block, "ring backward"))
                sums = differentiate(block, part, (rank - step) % communicator.size)
                if step > 1:
                    # What the ranks before have found for these same keys.
                    _add(sums, returning.popleft().wait())
                returning.append(communicator.ring_shift(sums, "ring gradients"))
        own_late = differentiate(late.of(payload), late, rank)
        sink_gradient(ctx.spec.score, params, total, delta, gradients)
        own = _join_own(payload, parts, (own_late, own_early), returning)
        sums = (*gradients.query, *own, *gradients.params)
        tensor_gradients = []
        for gradient, tensor in zip(sums, tensors, strict=True):
            tensor_gradients.append(gradient.to(tensor.dtype))
        return *[None] * 7, *tensor_gradients


def _first_hop(
    communicator: Communicator, payload: Tensors, parts: Sequence[KeyPart], name: str
) -> deque[Pending]:
    """Starts sending a rank's own keys to the next rank, part by part."""
    arriving: deque[Pending] = deque()
    if communicator.size > 1:
        for part in parts:
            arriving.append(communicator.ring_shift(part.of(payload), name))
    return arriving


def _join_own(
    payload: Tensors,
    parts: Sequence[KeyPart],
    own: tuple[list[Tensor], list[Tensor]],
    returning: deque[Pending],
) -> list[Tensor]:
    """Returns the gradients of a rank's own keys: its own sums and those that come home.

    Args:
        own: sums of the earlier and of the later keys; no tensors where the earlier are all.
        returning: what the other ranks have found, by part.
    """
    early, late = own
    if not late:
        for pending in returning:
            _add(early, pending.wait())
        return early
    joined = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in payload]
    middle = early[0].shape[1]
    for part in parts:
        sums, first = (early, 0) if part.start < middle else (late, middle)
        here = [tensor[:, part.start - first : part.stop - first] for tensor in sums]
        if returning:
            _add(here, returning.popleft().wait())
        for whole, tensor in zip(joined, here):
            whole[:, part.start : part.stop] = tensor
    return joined


def _add(sums: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for accumulator, other in zip(sums, others, strict=True):
        accumulator += other
