"""An encoder: every token sees its whole document, and a head says what hidden tokens were."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.feedforward import ACTIVATIONS, Activation
from models.init import INIT_STD
from models.layer import Layer
from models.loss import token_losses
from models.micro_batch import MicroBatch
from models.norms import Kind, Place
from models.positions.base import Position
from models.ranges import Positive, Some
from models.span import Span


class MaskedEncoder(Decoder):
    """Blocks behind normed embeddings, and a head for objective=masked.

    What a token sees is the matter of the mixers: bidirectional ones make an encoder of the stack.

    Args:
        vocabulary, width, mixers, feedforwards, position, init_std: as in Decoder.
        tie_embeddings: use the embedding as the matrix of the head.
        norm, norm_eps, norm_place: of all layers; models/norms.py.
        embedding_norm: norm the sum of embeddings, positions and segments.
        segments: kinds of stretches of a document (BERT's token types), each with a vector that is
            added to its tokens; all tokens are of the first kind unless a call says otherwise. 0:
            none.
        head_transform: activation between the linear map and the norm that stand before the head,
            which then has a bias; null: the head reads the last layer.
        pooler: have a map of a document's first token, tanh(W x + b). The loss of hidden tokens
            does not reach it, so it stays as it is.

    Source: Devlin et al. 2018 (arXiv:1810.04805), without its loss of the next sentence.
    """

    segments: nn.Module | None
    transform: nn.Module | None
    pooler: nn.Module | None

    def __init__(
        self,
        vocabulary: int,
        width: int,
        mixers: Sequence[nn.Module],
        feedforwards: Sequence[nn.Module],
        *,
        position: Position | None = None,
        tie_embeddings: bool = True,
        init_std: float = INIT_STD,
        norm: Kind = "layer",
        norm_eps: Positive | None = None,
        norm_place: Place = "after",
        embedding_norm: bool = True,
        segments: Some = 2,
        head_transform: Activation | None = "gelu",
        pooler: bool = False,
    ):
        super().__init__(
            vocabulary,
            width,
            mixers,
            feedforwards,
            position=position,
            tie_embeddings=tie_embeddings,
            init_std=init_std,
            norm=norm,
            norm_eps=norm_eps,
            norm_place=norm_place,
            embedding_norm=embedding_norm,
        )
        self.register_module("segments", nn.Embedding(segments, width) if segments else None)
        transform = None
        if head_transform is not None:
            transform = HeadTransform(width, head_transform, 1e-5 if norm_eps is None else norm_eps)
            self.head.bias = nn.Parameter(torch.empty(vocabulary))
        self.register_module("transform", transform)
        self.register_module("pooler", nn.Linear(width, width) if pooler else None)
        if self.pooler is not None:
            self.pooler.requires_grad_(False)

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """See Decoder.forward."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        x = self.hidden(tokens, span)
        if self.transform is not None:
            x = self.transform(x)
        if targets is None:
            return self.head(x)
        return token_losses(x, self.head.weight, targets, bias=self.head.bias)

    def embedded(self, tokens: Tensor, span: Span, segments: Tensor | None = None) -> Tensor:
        """See Decoder.embedded.

        Args:
            segments: [B, T] int64, the kind of each token's stretch; None: the first.
        """
        x = self.embed(tokens)
        if self.position is not None:
            x = x + self.position(span)
        if self.segments is not None:
            x = x + self.segments(torch.zeros_like(tokens) if segments is None else segments)
        return x if self.embed_norm is None else self.embed_norm(x)

    def pooled(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., width]: the map of the hidden states of first tokens.

        Raises:
            ValueError: the model has none.
        """
        if self.pooler is None:
            raise ValueError("model.pooler=false: this encoder has no map of first tokens")
        return torch.tanh(self.pooler(hidden))


class HeadTransform(Layer):
    """norm(activation(W x + b)): what BERT's head for hidden tokens reads."""

    def __init__(self, width: int, activation: Activation, eps: float):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self.norm(self.activation(self.dense(hidden)))
