"""The reading of a graph's node: the nodes at the other ends of its edges.

The nodes of a graph are the tokens of a document. The edges into a node are given as a list of
positions in the document, so they are sharded as tokens are: by destination. The primitive has no
parameters.

Letters: B rows, T tokens, K entries of a list, E edges of the tokens at hand, U different nodes
that these read, F features.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.primitive import Primitive
from models.span import Span

NO_NEIGHBOR = -1  # fills a list of neighbours up


@dataclass(frozen=True)
class Edges:
    """The edges into the tokens at hand.

    Attributes:
        destination: [E] int64, rising: row x T + token, of the tokens at hand.
        source: [E] int64, place among what `Neighbors.forward` brings.
        position: [E] int64, position of the source in its document.
        exchange: what a driver needs to bring the sources; None on one device.
    """

    destination: Tensor
    source: Tensor
    position: Tensor
    exchange: Any = None


class Neighbors(Primitive):
    """Brings the features of the sources of all edges, on one device, which holds whole rows."""

    counts_flops = False  # it computes nothing

    def edges(self, neighbors: Tensor, span: Span, *, self_loops: bool) -> Edges:
        """Lists the edges into the tokens at hand.

        Args:
            neighbors: [B, T, K] int64, positions in the token's document, NO_NEIGHBOR where a list
                has fewer. A position that is listed twice makes two edges. Positions that the
                document does not have are the caller's fault: the data checks them.
            span: addresses of the tokens.
            self_loops: every node has exactly one edge from itself, listed or not. False: it has
                those that are listed.
        """
        destination, position = listed_edges(neighbors, span, self_loops=self_loops)
        # A document lies unbroken in its row, so positions differ as places do.
        source = destination - span.pos.flatten()[destination] + position
        return Edges(destination, source, position)

    def forward(self, x: Tensor, edges: Edges) -> Tensor:
        """[B, T, F] -> [U, F]: features of the nodes that `edges.source` counts."""
        return x.flatten(0, 1)


def listed_edges(neighbors: Tensor, span: Span, *, self_loops: bool) -> tuple[Tensor, Tensor]:
    """Returns (destination, position of the source) of the edges, each [E]; see `Neighbors`."""
    own = span.pos[..., None]
    listed = neighbors != NO_NEIGHBOR
    if self_loops:
        listed = listed & (neighbors != own)
        neighbors = torch.cat([neighbors, own], 2)
        listed = torch.cat([listed, torch.ones_like(own, dtype=torch.bool)], 2)
    listed = listed & span.valid()[..., None]
    tokens = torch.arange(span.pos.numel(), device=span.pos.device).view_as(span.pos)
    destination = tokens[..., None].expand_as(neighbors)
    # How many are listed is not known on the meta device: there every entry counts.
    if listed.is_meta:
        return destination.flatten(), neighbors.flatten()
    return destination[listed], neighbors[listed]
