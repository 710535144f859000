"""Graph attention: a node is a weighted sum of the nodes at the other ends of its edges.

Nodes are tokens and a graph is a document. Logits are additive, as Bahdanau's; softmax runs over
the edges into a node, which lie on the node's own rank.

Letters: B rows, T tokens, K entries of a list of neighbours, E edges, H heads, D head width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.counter_rng import CounterRNG, address, mix_bits
from models.init import Rule
from models.layer import Layer
from models.masks.algebra import FAR
from models.primitives.neighbors import Edges, Neighbors
from models.span import Span

Scoring = Literal["gat", "gatv2", "mean"]


class GraphAttention(Layer):
    """One layer of GAT or GATv2, or of mean aggregation.

        gat     e_ij = leaky(a_to . W h_i + a_from . W h_j)
        gatv2   e_ij = a . leaky(W_to h_i + W h_j)
        mean    e_ij = 0
        h'_i = sum over edges j -> i of softmax_j(e_ij) W h_j + b, for each head

    Args:
        in_width, head_width: channels of a node, and of a head of the result.
        heads: H; they are concatenated, or averaged with `concat=False`.
        scoring: gat (Velickovic et al. 2018, arXiv:1710.10903), gatv2 (Brody et al. 2022,
            arXiv:2105.14491) or mean, which has no attention.
        self_loops: every node has an edge from itself.
        slope: of the leaky ReLU below 0.
        feature_dropout: share of the channels of h that are dropped in training.
        weight_dropout: share of the softmax weights that are dropped in training.
        share_weights: gatv2 with W_to = W.
        layer, seed: what dropout is drawn from, besides the step and the address of a node or of
            both ends of an edge: the same numbers on any ranks.

    In GAT the order of a node's neighbours is the same for every node that reads them; GATv2 has no
    such limit.
    """

    def __init__(
        self,
        in_width: int,
        head_width: int,
        heads: int,
        *,
        concat: bool = True,
        scoring: Scoring = "gatv2",
        self_loops: bool = True,
        slope: float = 0.2,
        feature_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        share_weights: bool = False,
        layer: int = 0,
        seed: int = 0,
    ):
        super().__init__()
        self.heads = heads
        self.concat = concat
        self.self_loops = self_loops
        self.slope = slope
        self.source = nn.Linear(in_width, heads * head_width, bias=False)
        self.target = None
        if scoring == "gatv2" and not share_weights:
            self.target = nn.Linear(in_width, heads * head_width, bias=False)
        shape = (heads, head_width)
        self.score = None if scoring == "mean" else nn.Parameter(torch.empty(shape))
        self.target_score = nn.Parameter(torch.empty(shape)) if scoring == "gat" else None
        width = heads * head_width if concat else head_width
        self.bias = nn.Parameter(torch.zeros(width))
        self.neighbors = Neighbors()
        self.feature_dropout = AddressedDropout(feature_dropout, "feature dropout", layer, seed)
        self.weight_dropout = AddressedDropout(weight_dropout, "weight dropout", layer, seed)

    def init_rules(self) -> dict[str, Rule]:
        """Starts everything as Glorot & Bengio 2010, as the paper does."""
        names = ("source.weight", "target.weight", "score", "target_score")
        there = {name for name, _ in self.named_parameters()}
        return {name: glorot for name in names if name in there}

    def causal_from(self) -> int:
        """See Layer: an edge may come from any node of the graph."""
        return FAR

    def forward(self, x: Tensor, neighbors: Tensor, span: Span) -> Tensor:
        """[B, T, in_width] -> [B, T, heads x head_width], or [B, T, head_width] where averaged.

        Args:
            x: features of the nodes.
            neighbors: [B, T, K] int64, positions of the sources of the edges into each node;
                NO_NEIGHBOR where there are fewer.
            span: addresses of the nodes.
        """
        edges = edges_at(self.neighbors, neighbors, span, self_loops=self.self_loops)
        x = self.feature_dropout(x, address(span))
        sent = self.source(x).unflatten(-1, (self.heads, -1))
        received = sent if self.target is None else self.target(x).unflatten(-1, (self.heads, -1))
        # [E, H, D]: what comes along each edge.
        message = self.neighbors(sent.flatten(2), edges)[edges.source]
        message = message.unflatten(-1, (self.heads, -1))
        logits = self._logits(message, received.flatten(0, 1), edges)
        weights = edge_softmax(logits, edges.destination, span.pos.numel())
        weights = self.weight_dropout(weights, _edge_address(edges, span))
        total = torch.zeros_like(sent.flatten(0, 1))
        total = total.index_add(0, edges.destination, (weights[..., None] * message).to(sent.dtype))
        total = total.view_as(sent)
        out = total.flatten(2) if self.concat else total.mean(2)
        return out + self.bias

    def _logits(self, message: Tensor, received: Tensor, edges: Edges) -> Tensor:
        """[E, H] logits.

        Args:
            message: [E, H, D].
            received: [B T, H, D], what the nodes at hand say of themselves.
        """
        if self.score is None:
            return message.new_zeros(message.shape[:2])
        if self.target_score is None:
            pair = F.leaky_relu(message + received[edges.destination], self.slope)
            return (pair * self.score).sum(-1)
        own = (received * self.target_score).sum(-1)
        logits = (message * self.score).sum(-1) + own[edges.destination]
        return F.leaky_relu(logits, self.slope)


class AddressedDropout(Layer):
    """Inverted dropout whose choices depend on addresses, and so not on how rows are sharded.

    Args:
        share: that is dropped in training, 0 or more and below 1.
        purpose, layer, seed: see CounterRNG.
    """

    def __init__(self, share: float, purpose: str, layer: int, seed: int):
        super().__init__()
        if not 0 <= share < 1:
            raise ValueError(
                f"model.{purpose.replace(' ', '_')}={share}: a share must be 0 or more and below 1;"
                " use 0 for no dropout"
            )
        self.share = share
        self.chance = CounterRNG(seed, purpose, layer) if share else None

    def forward(self, x: Tensor, addresses: Tensor) -> Tensor:
        """[..., C] -> [..., C], for addresses [...] int64."""
        if self.chance is None or not self.training:
            return x
        keep = self.chance(addresses, x.shape[-1]) >= self.share
        return torch.where(keep, x / (1 - self.share), 0)


def edges_at(leaf: Neighbors, neighbors: Tensor, span: Span, *, self_loops: bool) -> Edges:
    """Returns the edges into the tokens at hand, listed once for all layers that share them."""

    def build() -> Edges:
        return leaf.edges(neighbors, span, self_loops=self_loops)

    return span.cache.get(("edges", self_loops), build, neighbors)


def edge_softmax(logits: Tensor, destination: Tensor, nodes: int) -> Tensor:
    """Softmax over the edges into each node, [E, H] -> [E, H], in at least float32.

    Args:
        destination: [E] int64, below `nodes`.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index = destination[:, None].expand_as(wide)
    highest = wide.new_full((nodes, wide.shape[1]), -torch.inf)
    highest = highest.scatter_reduce(0, index, wide.detach(), "amax")
    exponential = (wide - highest[destination]).exp()
    total = wide.new_zeros(nodes, wide.shape[1]).index_add(0, destination, exponential)
    return exponential / total[destination]


def _edge_address(edges: Edges, span: Span) -> Tensor:
    """[E] int64: a number for each pair of nodes, whatever the ranks; edges of equal ends share
    it."""
    return mix_bits(address(span)).flatten()[edges.destination] + edges.position


def glorot(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in +- sqrt(6 / (rows + columns)); Glorot & Bengio 2010."""
    bound = (6 / sum(shape[-2:])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * bound
