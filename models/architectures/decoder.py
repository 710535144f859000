"""A decoder: tokens in, logits or losses out. The road from config to loss passes here on its way
to models/loss.py."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from models.block import ValueBlock, block
from models.init import INIT_STD, Rule, ScaledNormal
from models.layer import Layer
from models.loss import capped, token_losses
from models.memory.base import Memory
from models.micro_batch import MicroBatch
from models.norms import Kind, NormStyle, Place
from models.positions.base import Position
from models.ranges import Positive
from models.span import Span


class Decoder(Layer):
    """Blocks between an embedding and an output head.

    Args:
        vocabulary: number of different tokens.
        width: of the residual stream.
        mixers: one for each layer; each a module (x [B, T, width], span) -> [B, T, width].
        feedforwards: one for each layer; likewise (x, span) -> [B, T, width].
        position: its embedding, if it has one, is added to the tokens'.
        tie_embeddings: use the embedding as the output head (Press & Wolf 2017, arXiv:1608.05859).
        init_std: of the initial weights of matrices; narrow models learn sooner with more, such as
            width^-0.5.
        memory: what stands around all layers, if it has anything that does; the mixers have theirs
            in them already.
        norm: rms, rms_offset (gain 1 + weight, as Gemma) or layer (with a bias); models/norms.py.
        norm_eps: added to the mean square under the root; null: the smallest step of the type.
        norm_place: before a layer, after its sum with the input, or both before and behind it.
        embedding_scale: factor of the token embeddings, rounded to the type that is computed in.
        embedding_norm: norm the embeddings, positions among them, before the first layer.
        logit_cap: bends logits into (-cap, cap) by cap tanh(logits / cap) (Gemma 2,
            arXiv:2408.00118); null: they are not bent.
    """

    embed_norm: nn.Module | None

    def __init__(
        self,
        vocabulary: int,
        width: int,
        mixers: Sequence[nn.Module],
        feedforwards: Sequence[nn.Module],
        *,
        position: Position | None = None,
        tie_embeddings: bool = False,
        init_std: float = INIT_STD,
        memory: Memory | None = None,
        norm: Kind = "rms",
        norm_eps: Positive | None = None,
        norm_place: Place = "before",
        embedding_scale: Positive = 1.0,
        embedding_norm: bool = False,
        logit_cap: Positive | None = None,
    ):
        super().__init__()
        if init_std <= 0:
            raise ValueError(
                f"init_std={init_std} starts no weight anywhere; choose one above 0, for example"
                f" {INIT_STD}"
            )
        norms = NormStyle(norm, norm_eps, norm_place)
        self.init_std = init_std
        self.embedding_scale = embedding_scale
        self.logit_cap = logit_cap
        self.embed = nn.Embedding(vocabulary, width)
        self.position = position.embedding(width) if position else None
        self.register_module("embed_norm", norms.make(width) if embedding_norm else None)
        self.blocks = nn.ModuleList(
            block(width, *parts, norms) for parts in zip(mixers, feedforwards, strict=True)
        )
        self.memory = memory.stack(width) if memory else None
        # Where norms stand behind every layer, the last one is the stack's own.
        self.norm = nn.Identity() if norm_place == "after" else norms.make(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def init_rules(self) -> dict[str, Rule]:
        """Start what adds to the residual stream smaller with more layers (Radford et al. 2019)."""
        small = ScaledNormal((2 * max(1, len(self.blocks))) ** -0.5)
        outputs = ("feedforward.down.weight", "mixer.out.weight")
        names = [f"blocks.{i}.{leaf}" for i in range(len(self.blocks)) for leaf in outputs]
        there = {name for name, _ in self.named_parameters()}
        return {name: small for name in names if name in there}

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, vocabulary], or with targets the losses [B, T] in nats (0
        where IGNORE)."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        if targets is None:
            return capped(self.head(self.hidden(tokens, span)), self.logit_cap)
        return self.losses_of(self._stream(tokens, span), targets)

    def losses_of(self, x: Tensor, targets: Tensor) -> Tensor:
        """[B, T, width], targets [B, T] -> losses [B, T]: what follows the blocks."""
        return token_losses(self.norm(x), self.head.weight, targets, cap=self.logit_cap)

    def hidden(self, tokens: Tensor, span: Span) -> Tensor:
        """[B, T] int64 -> [B, T, width]: what the last layer gives, normed, before the head."""
        return self.norm(self._stream(tokens, span))

    def _stream(self, tokens: Tensor, span: Span) -> Tensor:
        """[B, T] int64 -> [B, T, width]: what the last block gives."""
        x = self.embedded(tokens, span)
        if self.memory is None:
            return self._through(x, span)
        return self.memory(x, span, self._through)

    def read(self, tokens: Tensor, span: Span) -> Tensor:
        """[B, T] int64 -> [B, T, width]: each token by itself."""
        return self.embed(tokens)

    def embedded(self, tokens: Tensor, span: Span) -> Tensor:
        """[B, T] int64 -> [B, T, width]: what the first layer reads."""
        x = self.read(tokens, span)
        if self.embedding_scale != 1:
            x = x * x.new_full((), self.embedding_scale)
        if self.position is not None:
            x = x + self.position(span)
        return x if self.embed_norm is None else self.embed_norm(x)

    def _through(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]: all layers."""
        last = x
        for output in self.layer_outputs(x, span):
            last = output
        return last

    def layer_outputs(self, x: Tensor, span: Span) -> Iterator[Tensor]:
        """[B, T, width] -> [B, T, width] of each layer, which the next one reads."""
        values: Tensor | None = None  # of the first layer that shares them
        for layer in self.blocks:
            if isinstance(layer, ValueBlock):
                x, values = layer(x, span, values)
            else:
                x = layer(x, span)
            yield x
