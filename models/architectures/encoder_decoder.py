"""An encoder-decoder Transformer: a source is read from both sides, and the row is said from it.

Letters: B rows, T tokens of the row, S tokens of the source.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from models.architectures.source import SourceMemory, needs_source, refuse_memory
from models.attention.cross import CrossAttention
from models.block import Block, ValueBlock, block
from models.init import INIT_STD, Rule, ScaledNormal
from models.layer import Layer, hook
from models.loss import capped, token_losses
from models.memory.base import Memory
from models.micro_batch import MicroBatch
from models.norms import Kind, NormStyle, Place
from models.positions.base import Position
from models.ranges import Count, Positive
from models.span import Span


class SourceStates(NamedTuple):
    """The encoder's output [B, S, width], and the addresses of the source's tokens.

    The output is None where the row goes on from earlier tokens, which have left the keys and
    values of their source in `Span.past`.
    """

    hidden: Tensor | None
    span: Span | None


class CrossBlock(Block):
    """A block with cross-attention between its mixer and its feed-forward layer.

    Args:
        width: of the residual stream.
        mixer, feedforward, norms: as in Block.
        cross: reads the source.
    """

    cross_post_norm: nn.Module | None

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        cross: CrossAttention,
        feedforward: nn.Module,
        norms: NormStyle,
    ):
        super().__init__(width, mixer, feedforward, norms)
        if hook(mixer, "shares_values"):
            raise ValueError(
                f"{type(mixer).__name__} shares the values of the first layer with later ones,"
                " which a layer with cross-attention does not pass on; use another mixer in the"
                " decoder, for example mixer=full"
            )
        self.after = norms.place == "after"
        self.cross_norm = norms.make(width)
        self.cross = cross
        both = norms.place == "both"
        self.register_module("cross_post_norm", norms.make(width) if both else None)
        self.memory = SourceMemory()

    def forward(self, hidden: Tensor, span: Span, source: SourceStates) -> Tensor:  # pyright: ignore
        """[B, T, width] -> [B, T, width]."""
        payload, source_span = self.memory(
            span, None if source.hidden is None else self.cross.remember(source.hidden), source.span
        )
        if self.after:
            hidden = self.mixer_norm(hidden + self.mixer(hidden, span))
            seen = self.cross.attend(hidden, span, payload, source_span)
            hidden = self.cross_norm(hidden + seen)
            if self.feedforward_norm is None:
                return hidden
            return self.feedforward_norm(hidden + self.feedforward(hidden, span))
        hidden = hidden + _normed(self.mixer_post_norm, self.mixer(self.mixer_norm(hidden), span))
        seen = self.cross.attend(self.cross_norm(hidden), span, payload, source_span)
        return self._finish(hidden, _normed(self.cross_post_norm, seen), span)


class EncoderDecoder(Layer):
    """Encoder blocks over the source, and blocks with cross-attention over the row.

    A token of the row sees the source of its own document: documents of the row and of the source
    have equal numbers. Both may be shared over ranks, each by a layout of its own.

    Args:
        vocabulary: number of different tokens, of the source and the row together.
        width: of both residual streams.
        heads, kv_heads: of cross-attention.
        mixers, feedforwards: one for each layer of the decoder.
        encoder_mixers, encoder_feedforwards: one for each layer of the encoder.
        position: its embedding, if it has one, is added to the tokens of the row.
        encoder_position: the same for the source.
        memory: none; a row has its source.
        tie_embeddings: use the embedding as the output head (Press & Wolf 2017, arXiv:1608.05859).
        share_embeddings: the source is read through the same embedding.
        init_std: of the initial weights of matrices.
        norm, norm_eps, norm_place: as in Decoder.
        embedding_scale: factor of the token embeddings; None: sqrt(width), as the original.
        embedding_norm: a norm of the embeddings, as BART has it (arXiv:1910.13461).
        cross_head_width: channels of a head of cross-attention; None: width / heads.
        cross_scale: factor of its dot products; None: 1 / sqrt(head width). T5 has 1.0.
        cross_bias: its projections have biases.
        logit_cap: as in Decoder.

    Source: Vaswani et al. 2017 (arXiv:1706.03762); T5, Raffel et al. 2019 (arXiv:1910.10683).
    """

    reads_source = True
    source_embed: nn.Module | None

    def __init__(
        self,
        vocabulary: int,
        width: int,
        heads: int,
        kv_heads: int,
        mixers: Sequence[nn.Module],
        feedforwards: Sequence[nn.Module],
        encoder_mixers: Sequence[nn.Module],
        encoder_feedforwards: Sequence[nn.Module],
        *,
        position: Position | None = None,
        encoder_position: Position | None = None,
        memory: Memory | None = None,
        tie_embeddings: bool = False,
        share_embeddings: bool = True,
        init_std: Positive = INIT_STD,
        norm: Kind = "rms",
        norm_eps: Positive | None = None,
        norm_place: Place = "before",
        embedding_scale: Positive | None = 1.0,
        embedding_norm: bool = False,
        cross_head_width: Count | None = None,
        cross_scale: Positive | None = None,
        cross_bias: bool = False,
        logit_cap: Positive | None = None,
    ):
        super().__init__()
        refuse_memory(self, memory)
        norms = NormStyle(norm, norm_eps, norm_place)
        self.init_std = init_std
        self.embedding_scale = width**0.5 if embedding_scale is None else embedding_scale
        self.logit_cap = logit_cap
        self.embed = nn.Embedding(vocabulary, width)
        own_table = None if share_embeddings else nn.Embedding(vocabulary, width)
        self.register_module("source_embed", own_table)
        self.position = position.embedding(width) if position else None
        self.encoder_position = encoder_position.embedding(width) if encoder_position else None
        self.embed_norm = norms.make(width) if embedding_norm else nn.Identity()
        self.source_embed_norm = norms.make(width) if embedding_norm else nn.Identity()
        self.encoder_blocks = nn.ModuleList(
            block(width, *parts, norms)
            for parts in zip(encoder_mixers, encoder_feedforwards, strict=True)
        )
        cross = partial(CrossAttention, width, heads, kv_heads, bias=cross_bias)
        options = {"head_width": cross_head_width, "scale": cross_scale, "out_bias": cross_bias}
        self.blocks = nn.ModuleList(
            CrossBlock(width, mixer, cross(**options), feedforward, norms)
            for mixer, feedforward in zip(mixers, feedforwards, strict=True)
        )
        # Where norms stand behind every layer, the last one is the stack's own.
        after = norm_place == "after"
        self.encoder_norm = nn.Identity() if after else norms.make(width)
        self.norm = nn.Identity() if after else norms.make(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tie_embeddings:
            self.head.weight = self.embed.weight

    def init_rules(self) -> dict[str, Rule]:
        """Starts what adds to a residual stream smaller with more layers (Radford et al. 2019)."""
        parameters = {name for name, _ in self.named_parameters()}
        rules: dict[str, Rule] = {}
        for stack, additions in ((self.encoder_blocks, 2), (self.blocks, 3)):
            name = "encoder_blocks" if stack is self.encoder_blocks else "blocks"
            small = ScaledNormal((additions * max(1, len(stack))) ** -0.5)
            for number in range(len(stack)):
                for leaf in ("feedforward.down.weight", "mixer.out.weight", "cross.out.weight"):
                    rules[f"{name}.{number}.{leaf}"] = small
        return {name: rule for name, rule in rules.items() if name in parameters}

    def source_parts(self) -> Iterable[nn.Module]:
        """See Layer."""
        parts = [self.encoder_blocks, self.encoder_norm, self.source_embed_norm]
        if self.encoder_position is not None:
            parts.append(self.encoder_position)
        return parts

    def cut_in_time(self) -> str | None:
        """See Layer."""
        return "the source of a row is read whole before its first token"

    def forward(self, batch: MicroBatch) -> Tensor:
        """Returns logits [B, T, vocabulary], or with targets the losses [B, T] in nats.

        Without a source the row goes on from what earlier tokens left in `Span.past`.
        """
        tokens, span, targets, source = MicroBatch.of(batch)
        states = SourceStates(None, None)
        if source is not None:
            states = SourceStates(self.encode(source), source.span)
        elif span.past is None:
            raise needs_source(self)
        hidden = self._embedded(tokens, self.embed)
        if self.position is not None:
            hidden = hidden + self.position(span)
        hidden = self.embed_norm(hidden)
        for layer in self.blocks:
            hidden = layer(hidden, span, states)
        hidden = self.norm(hidden)
        if targets is None:
            return capped(self.head(hidden), self.logit_cap)
        return token_losses(hidden, self.head.weight, targets, cap=self.logit_cap)

    def encode(self, source: MicroBatch) -> Tensor:
        """Returns the encoder's output [B, S, width]."""
        table = self.embed if self.source_embed is None else self.source_embed
        hidden = self._embedded(source.tokens, table)
        if self.encoder_position is not None:
            hidden = hidden + self.encoder_position(source.span)
        hidden = self.source_embed_norm(hidden)
        values: Tensor | None = None  # of the first layer that shares them
        for layer in self.encoder_blocks:
            if isinstance(layer, ValueBlock):
                hidden, values = layer(hidden, source.span, values)
            else:
                hidden = layer(hidden, source.span)
        return self.encoder_norm(hidden)

    def _embedded(self, tokens: Tensor, table: nn.Module) -> Tensor:
        hidden = table(tokens)
        if self.embedding_scale == 1:
            return hidden
        return hidden * hidden.new_full((), self.embedding_scale)


def _normed(norm: nn.Module | None, hidden: Tensor) -> Tensor:
    return hidden if norm is None else norm(hidden)
