"""Ulysses driver of Softmax: trades tokens for heads, attends to the whole row, trades back.

Source: Jacobs et al. 2023 (arXiv:2309.14509). Ours takes head counts that the ranks do not divide,
sends a key head to every rank that needs it where there are more ranks than key heads, and gives
masks and scores the global head numbers.

Letters: B rows, c local tokens, P ranks, H query heads, E value width.
"""

import torch
from torch import Tensor, nn

from models.primitives.softmax import Softmax
from models.scores import Tensors
from models.span import Span, to_device
from parallel.collectives import Communicator, heads_to_seq, seq_to_heads
from parallel.drivers.softmax_ring import Ring
from parallel.partition import head_ranges
from parallel.sharding import RankGroup, SequenceSharding


class Ulysses(nn.Module):
    """Replaces a Softmax whose tokens are sharded over the ranks of `communicator`.

    Args:
        core: attention over the tokens of all ranks of the communicator.
    """

    def __init__(self, core: Softmax | Ring, communicator: Communicator):
        super().__init__()
        self.core = core
        self.communicator = communicator

    def row(self, span: Span) -> SequenceSharding | RankGroup:
        """Returns what the ranks of the communicator hold together."""
        return span.sharding

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

        Raises:
            ValueError: the score's queries have no heads to trade.
        """
        if span.sharding is None:  # every rank has these tokens: one step of decoding
            return self.core(query, payload, params, span=span, kv_span=kv_span, heads=heads)
        if span.past is not None:
            leaf = self.core.core if isinstance(self.core, Ring) else self.core
            payload, kv_span = span.past.hold(leaf, payload, span if kv_span is None else kv_span)
        score = self.core.score
        query_row = self.row(span)
        key_row = query_row if kv_span is None else self.row(kv_span)
        heads_dim = score.query_heads[0]
        if heads_dim is None:
            raise ValueError(
                "parallel.method=ulysses needs a score whose queries have heads; use ring"
            )
        count = query[0].shape[heads_dim]
        ranges = head_ranges(count, self.communicator.size)
        first, last = ranges[self.communicator.rank]
        own_query = []
        for tensor, dim in zip(query, score.query_heads, strict=True):
            traded, _ = self._trade_tokens(tensor, dim, count)
            own_query.append(query_row.to_global_order(traded))
        traded_payload = []
        for tensor, dim in zip(payload, score.payload_heads, strict=True):
            traded_payload.append(self._trade_tokens(tensor, dim, count))
        own_payload = []
        for tensor in _align_heads(traded_payload, score.payload_heads, last - first):
            own_payload.append(key_row.to_global_order(tensor))
        own_params = []
        for param, dim in zip(params, score.param_heads, strict=True):
            own_params.append(param if dim is None else param.narrow(dim, first, last - first))
        # ALiBi and head-wise masks need the numbers of the whole model, not of this rank's share.
        numbers = torch.arange(count, device=query[0].device) if heads is None else heads
        output = self.core(
            own_query,
            own_payload,
            own_params,
            span=query_row.whole,
            kv_span=key_row.whole,
            heads=numbers[first:last],
        )
        return heads_to_seq(query_row.to_rank_order(output), self.communicator, 2, ranges)

    def _trade_tokens(self, x: Tensor, dim: int | None, count: int) -> tuple[Tensor, Tensor | None]:
        """Brings the heads of the whole row that this rank's query heads need.

        Args:
            dim: dim of x that counts heads, or None.
            count: H.

        Returns:
            The traded tensor, and for each local query head the number of the head of it that it
            reads (None where x has no heads).
        """
        ranges = head_ranges(count, self.communicator.size)
        if dim is None:
            return seq_to_heads(x, self.communicator, None, ranges), None
        queries_per_head = count // x.shape[dim]
        needed = []
        for start, stop in ranges:
            needed.append((start // queries_per_head, (stop - 1) // queries_per_head + 1))
        first, last = ranges[self.communicator.rank]
        first_needed = needed[self.communicator.rank][0]
        # On the CPU: a device would be waited for where these are looked at.
        reads = torch.arange(first, last, device="cpu") // queries_per_head - first_needed
        return seq_to_heads(x, self.communicator, dim, needed), reads


def _align_heads(
    traded: list[tuple[Tensor, Tensor | None]], dims: tuple[int | None, ...], heads: int
) -> list[Tensor]:
    """Repeats key heads where the local query heads do not fall into equal groups.

    All tensors get the same number of heads, as the attention kernels require.
    """
    counts = set()
    even = True
    for (tensor, reads), dim in zip(traded, dims):
        if dim is None or reads is None:
            continue
        count = tensor.shape[dim]
        counts.add(count)
        if heads % count:
            even = False
            continue
        groups = torch.arange(heads, device="cpu") // (heads // count)
        even = even and torch.equal(reads, groups)
    if even and len(counts) <= 1:
        return [tensor for tensor, _ in traded]
    aligned = []
    for (tensor, reads), dim in zip(traded, dims):
        if dim is not None and reads is not None:
            tensor = tensor.index_select(dim, to_device(reads, tensor.device))
        aligned.append(tensor)
    return aligned
