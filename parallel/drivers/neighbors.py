"""Driver of Neighbors: each rank asks for the nodes that its edges read, each node once.

Which nodes are read is known only to the rank that has the edges, so ranks first tell one another
what they want; layers that share edges share the answer. The nodes of other ranks that a rank reads
are its halo:

    bytes that a rank sends = (nodes that others read here) x F x bytes of a number, for each layer

and as many come back in backward as gradients.

Letters: B rows, T local tokens, P ranks, E edges, U different nodes that a rank reads, F features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.primitives.neighbors import Edges, Neighbors, listed_edges
from models.span import Span, to_device
from parallel.collectives import Communicator, all_to_all_rows
from parallel.sharding import SequenceSharding


@dataclass(frozen=True)
class NodeExchange:
    """Nodes that cross ranks.

    Attributes:
        outgoing: [sum(given)] int64, row x T + token, of the local nodes that ranks read, rank by
            rank.
        given, taken: nodes that go to each rank and come from it, this rank included.
    """

    outgoing: Tensor
    given: tuple[int, ...]
    taken: tuple[int, ...]


class NeighborExchange(Neighbors):
    """Replaces a Neighbors whose rows are sharded over the ranks of `communicator`."""

    def __init__(self, core: Neighbors, communicator: Communicator):
        super().__init__()
        self.core = core
        self.place = core.place
        self.communicator = communicator

    def edges(self, neighbors: Tensor, span: Span, *, self_loops: bool) -> Edges:
        """See Neighbors; every rank lists the edges into its own tokens."""
        if span.sharding is None:  # every rank has these tokens
            return self.core.edges(neighbors, span, self_loops=self_loops)
        destination, position = listed_edges(neighbors, span, self_loops=self_loops)
        wanted, source = _ranked_places(span, destination, position).unique(return_inverse=True)
        return Edges(destination, source, position, self._exchange(wanted, span.pos.numel()))

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """Runs Neighbors.forward over the ranks: [B, T, F] -> [U, F]."""
        exchange: NodeExchange | None = edges.exchange
        if exchange is None:
            return self.core(x, edges)
        outgoing = x.flatten(0, 1).index_select(0, exchange.outgoing)
        return all_to_all_rows(
            outgoing, self.communicator, exchange.given, exchange.taken, "neighbors"
        )

    def _exchange(self, wanted: Tensor, tokens: int) -> NodeExchange:
        """Asks for nodes, and learns which ones are asked for.

        Args:
            wanted: [U] int64, rising: rank x `tokens` + place on that rank.
            tokens: B T, of every rank.
        """
        ranks = self.communicator.size
        begins = torch.arange(ranks + 1, device=wanted.device) * tokens
        counts = torch.searchsorted(wanted, begins).diff()
        asked = self.communicator.all_to_all(list(counts.split(1)), [1] * ranks, "neighbors asked")
        given = torch.cat(asked).tolist()
        taken = counts.tolist()
        # The remainder by 0 is not defined, and there is nothing to ask for.
        numbers = wanted % max(1, tokens)
        requests = self.communicator.all_to_all(
            list(numbers.split(taken)), given, "neighbors asked"
        )
        return NodeExchange(torch.cat(requests), tuple(given), tuple(taken))


def _ranked_places(span: Span, destination: Tensor, position: Tensor) -> Tensor:
    """Returns [E] rank x B T + row x T + token of the source of each edge.

    Args:
        destination, position: [E], see Edges.
    """
    sharding: SequenceSharding = span.sharding
    rows, tokens = span.shape
    device = span.pos.device
    index = to_device(sharding.index(sharding.rank, rows), device)
    row = destination // max(1, tokens)
    # A document lies unbroken in its row, so positions differ as global places do.
    place = index.flatten()[destination] - span.pos.flatten()[destination] + position
    order = to_device(torch.stack([layout.order() for layout in sharding.layouts]), device)
    end_to_end = order.expand(rows, -1)[row, place]
    owner = end_to_end // max(1, tokens)
    return (owner * rows + row) * tokens + end_to_end % max(1, tokens)
