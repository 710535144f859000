"""Ring attention: queries stay, keys and values rotate over the ranks, partial attentions merge.

Source: Liu et al. 2023 (arXiv:2310.01889). Ours differs in three ways: one autograd function around
the whole exchange saves only what is local and sends the payload round again in backward; any
payload of a score rotates (latents, keys and values, gates); a rank's own keys come last in
backward, so that gradients come home after size - 1 hops.

Letters: B rows, T queries, H heads, E value width.
"""

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
            block = list(payload)
            for step in range(communicator.size):
                # The next block travels while this one is computed.
                is_last = step == communicator.size - 1
                pending = None if is_last else communicator.ring_shift(block, "ring")
                source = (communicator.rank - step) % communicator.size
                source_span = kv_span.sharding.spans[source]
                blockwise.forward(spec, query, block, params, span, source_span, total)
                if pending is not None:
                    block = pending.wait()
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
        gradients = blockwise.Gradients.zeros(query, payload, params)

        def add_block(block: Tensors, source: int, returning: Pending | None) -> None:
            """Adds a block's share to the gradients; those of the block itself start anew."""
            gradients.payload = blockwise.Gradients.zeros((), payload, ()).payload
            blockwise.backward(
                ctx.spec,
                query,
                block,
                params,
                span,
                kv_span.sharding.spans[source],
                d_out=d_out,
                total=total,
                delta=delta,
                into=gradients,
            )
            if returning is not None:
                # Sums that the ranks before have found for these same keys.
                for local_sum, remote_sum in zip(gradients.payload, returning.wait()):
                    local_sum += remote_sum

        returning = None
        pending = None
        if communicator.size > 1:
            pending = communicator.ring_shift(payload, "ring backward")
        for step in range(1, communicator.size):
            block = pending.wait() if pending is not None else []
            pending = None
            if step < communicator.size - 1:
                pending = communicator.ring_shift(block, "ring backward")
            source = (communicator.rank - step) % communicator.size
            add_block(block, source, returning)
            returning = communicator.ring_shift(gradients.payload, "ring gradients")
        add_block(payload, communicator.rank, returning)
        sink_gradient(ctx.spec.score, params, total, delta, gradients)
        sums = (*gradients.query, *gradients.payload, *gradients.params)
        tensor_gradients = []
        for gradient, tensor in zip(sums, tensors, strict=True):
            tensor_gradients.append(gradient.to(tensor.dtype))
        return *[None] * 7, *tensor_gradients
