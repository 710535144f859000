"""AllGather driver of Softmax: fetches only the keys that a rank's queries see.

A rank attends to its own keys while those of the others travel, and to a part of those while the
next ones do; in backward gradients of a part go home while the next is computed.

A window becomes an exchange with neighbours, packed documents send only what they share, a source
of another length is cross-attention, and the dense case is the all-gather. Every rank derives from
the addresses what each other rank needs, so no request is sent. Backward fetches again: no rank
keeps keys of another between the two passes.

Source: Llama 3 (arXiv:2407.21783, section 3.3.2) gathers all keys; Tao et al. 2025, MagiAttention,
only needed ranges. Ours plans by single tokens, from any mask, and sums the returning gradients in
float32.

Letters: B rows, T queries, S local keys, F fetched keys of a row, P ranks.
"""

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
from models.scores import Tensors
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.key_exchange import Fetching, GatherPlan, Returning, gather_parts
from parallel.key_parts import KeyPart, even_parts, split_own


class AllGather(nn.Module):
    """Replaces a Softmax whose tokens are sharded over the ranks of `communicator`."""

    def __init__(self, core: Softmax, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

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
        key_span = span if kv_span is None else kv_span
        if span.past is not None:
            payload, key_span = span.past.hold(self.core, payload, key_span)
        plans, _ = gather_parts(spec.mask, span, key_span, spec.heads)
        return _AllGather.apply(
            spec,
            self.core.kept,
            self.communicator,
            plans,
            (span, key_span),
            len(query),
            len(payload),
            *query,
            *payload,
            *params,
        )


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        spec: blockwise.AttentionSpec,
        replay: AttentionReplay,
        communicator: Communicator,
        plans: tuple[GatherPlan, ...],
        spans: tuple[Span, Span],
        queries: int,
        payloads: int,
        *tensors: Tensor,
    ) -> Tensor:
        query, payload, params = split_tensors(tensors, queries, payloads)
        span, own_span = spans

        def compute() -> Partial:
            width = value_width(spec.score, payload, params, query)
            total = blockwise.empty_partial(query, len(spec.heads), width)
            fetching = Fetching(payload, plans, communicator, "allgather")
            for share in _own_shares(own_span, plans):
                # As backward cuts them, so that both need the same plans of blocks.
                if share.tokens:
                    own = share.of(payload), params, span, share.of_span(own_span)
                    blockwise.forward(spec, query, *own, total)
            for plan in plans:
                fetched = fetching.take()
                if plan.span.shape[1]:
                    blockwise.forward(spec, query, fetched, params, span, plan.span, total)
            add_sink(spec.score, params, total)
            return total[0].to(query[0].dtype), total[1]

        output, lse = replay.replay_or_compute(compute)
        ctx.spec = spec
        ctx.communicator = communicator
        ctx.plans = plans
        ctx.spans = spans
        ctx.counts = (queries, payloads)
        ctx.save_for_backward(output, lse, *tensors)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        communicator = ctx.communicator
        span, own_span = ctx.spans
        output, lse, *tensors = ctx.saved_tensors
        query, payload, params = split_tensors(tensors, *ctx.counts)
        d_out, delta, total = incoming_gradients(grads[0], None, output, lse)
        gradients = blockwise.Gradients.zeros(query, payload, params)

        def differentiate(block: Tensors, key_span: Span) -> list[Tensor]:
            """Returns the gradients of these keys; those of queries and parameters are added up."""
            into = gradients.with_keys(block)
            if key_span.shape[1] == 0:
                return into.payload
            blockwise.backward(
                ctx.spec,
                query,
                block,
                params,
                span,
                key_span,
                d_out=d_out,
                total=total,
                delta=delta,
                into=into,
            )
            return into.payload

        def differentiate_own(part: KeyPart) -> None:
            if part.tokens:
                part_span = part.of_span(own_span)
                part.add(gradients.payload, differentiate(part.of(payload), part_span))

        # Fetched once more rather than kept: memory must not grow with the number of ranks.
        fetching = Fetching(payload, ctx.plans, communicator, "fetch backward")
        returning = Returning(payload, ctx.plans, communicator, gradients.payload)
        early, late = _own_shares(own_span, ctx.plans)
        differentiate_own(early)
        for plan in ctx.plans:
            returning.give(differentiate(fetching.take(), plan.span))
        differentiate_own(late)
        returning.finish()
        sink_gradient(ctx.spec.score, params, total, delta, gradients)
        sums = (*gradients.query, *gradients.payload, *gradients.params)
        tensor_gradients = []
        for gradient, tensor in zip(sums, tensors, strict=True):
            tensor_gradients.append(gradient.to(tensor.dtype))
        return *[None] * 7, *tensor_gradients


def _own_shares(own_span: Span, plans: Sequence[GatherPlan]) -> tuple[KeyPart, KeyPart]:
    """Returns the keys of this rank that backward takes first, and those that it takes last."""
    return split_own(even_parts(own_span.shape[1], 2 if len(plans) > 1 else 1))
