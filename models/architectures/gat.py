"""A graph attention network: nodes with their edges in, a class for each node out.

Letters: B rows, T tokens, K entries of a list of neighbours, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.graphs.attention import GraphAttention, Scoring
from models.init import Rule, normal
from models.layer import Layer
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span


class GraphAttentionNetwork(Layer):
    """Layers of graph attention with ELU between them; the last one averages its heads.

    A document is a graph and its tokens are the nodes. A node comes with the number of its feature
    and the positions of the nodes that it reads, [B, T, 1 + K]. Of bare numbers [B, T], each node
    reads the one before it and the first of its document: an example for whoever examines a model
    without its data.

    Args:
        vocabulary: number of different features and classes.
        width: of hidden layers, all heads together.
        layers: of graph attention, the one that gives the classes among them.
        heads: of every layer; they divide width.
        scoring: gat (arXiv:1710.10903), gatv2 (arXiv:2105.14491), or mean, which weighs all
            neighbours alike.
        self_loops: every node reads itself.
        share_weights: gatv2 with one matrix for both ends of an edge.
        feature_dropout, weight_dropout: shares of the features that come into a layer, and of the
            softmax weights, that are dropped in training (0.6 in the paper).
        seed: of dropout, which depends on the step and on addresses, and not on ranks.

    Edges lie on the rank of the node that they lead into, and ranks send one another the nodes that
    the others read. Source: Velickovic et al. 2018 (arXiv:1710.10903), section 3.3; its features
    are vectors, ours numbers whose vectors are learned.
    """

    reads_edges = True

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        seed: int,
        *,
        scoring: Scoring = "gatv2",
        self_loops: bool = True,
        share_weights: bool = False,
        feature_dropout: float = 0.0,
        weight_dropout: float = 0.0,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        self.embed = nn.Embedding(vocabulary, width)
        blocks = []
        for layer in range(layers):
            last = layer == layers - 1
            blocks.append(
                GraphAttention(
                    width,
                    vocabulary if last else width // heads,
                    heads,
                    concat=not last,
                    scoring=scoring,
                    self_loops=self_loops,
                    share_weights=share_weights,
                    feature_dropout=feature_dropout,
                    weight_dropout=weight_dropout,
                    layer=layer,
                    seed=seed,
                )
            )
        self.blocks = nn.ModuleList(blocks)

    def init_rules(self) -> dict[str, Rule]:
        """Starts features at unit variance."""
        return {"embed.weight": normal(1.0)}

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T, 1 + K] int64 -> logits [B, T, vocabulary] of each node, or with targets the losses
        [B, T] in nats (0 where IGNORE)."""
        nodes, span, targets, _ = MicroBatch.of(batch)
        if nodes.dim() == 2:
            features = nodes
            neighbors = plain_neighbors(span)
        else:
            features = nodes[..., 0]
            neighbors = nodes[..., 1:]
        hidden = self.embed(features)
        for number, block in enumerate(self.blocks):
            hidden = block(F.elu(hidden) if number else hidden, neighbors, span)
        if targets is None:
            return hidden
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        losses = F.cross_entropy(
            wide.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE
        )
        return losses.view_as(targets)


def plain_neighbors(span: Span) -> Tensor:
    """[B, T, 2] positions that nodes read where no edges come with them: the one before, the first.

    The first node of a document has none before it: 0 - 1 is NO_NEIGHBOR.
    """
    return torch.stack([span.pos - 1, torch.zeros_like(span.pos)], 2)
