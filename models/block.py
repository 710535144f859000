"""One layer of a decoder: a mixer, in which tokens meet, then a feed-forward layer, which works on
each in turn."""

from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.cache.fused_step import step
from models.feedforward import NoFeedForward
from models.layer import Layer, hook
from models.norms import NormStyle
from models.span import Span

PRE_NORMS = NormStyle()


class Block(Layer):
    """x + mixer(norm(x)), then x + feedforward(norm(x)); Xiong et al. 2020 (arXiv:2002.04745), with
    RMS norms unless another style is given. Without a feed-forward layer the second half is left
    out."""

    feedforward_norm: nn.Module | None
    mixer_post_norm: nn.Module | None
    feedforward_post_norm: nn.Module | None

    def __init__(
        self,
        width: int,
        mixer: nn.Module,
        feedforward: nn.Module,
        norms: NormStyle = PRE_NORMS,
    ):
        super().__init__()
        self.mixer_norm = norms.make(width)
        self.mixer = mixer
        alone = isinstance(feedforward, NoFeedForward)
        self.register_module("feedforward_norm", None if alone else norms.make(width))
        self.feedforward = feedforward
        both = norms.place == "both"
        self.register_module("mixer_post_norm", norms.make(width) if both else None)
        self.register_module(
            "feedforward_post_norm", norms.make(width) if both and not alone else None
        )

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        if x.shape[1] == 1 and span.past is not None:
            stepped = step(self, x, span)
            if stepped is not None:
                return stepped
        return self._finish(x, self.mixer(self.mixer_norm(x), span), span)

    def _finish(self, x: Tensor, mixed: Tensor, span: Span) -> Tensor:
        """Adds what the mixer gave, and the feed-forward layer's part."""
        x = x + _normed(self.mixer_post_norm, mixed)
        if self.feedforward_norm is None:
            return x
        return self.transform(x, span)

    def transform(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]: the half of the block in which tokens do not meet."""
        assert self.feedforward_norm is not None
        transformed = self.feedforward(self.feedforward_norm(x), span)
        return x + _normed(self.feedforward_post_norm, transformed)


class PostNormBlock(Block):
    """norm(x + mixer(x)), then norm(x + feedforward(x)); Vaswani et al. 2017 (arXiv:1706.03762)."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = self.mixer_norm(x + self.mixer(x, span))
        if self.feedforward_norm is None:
            return x
        return self.transform(x, span)

    def transform(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]: the half of the block in which tokens do not meet."""
        assert self.feedforward_norm is not None
        return self.feedforward_norm(x + self.feedforward(x, span))


class ValueBlock(Block):
    """A block whose mixer also hears the values of the first such layer, token by token.

    Its mixer says shares_values = True and has a method values(x, span, first) -> (y, first): first
    is None in the first of these layers, which gives its own. They travel as an argument and a
    result, so that a block can be computed again, compiled or gathered by itself.
    """

    def forward(self, x: Tensor, span: Span, first: Tensor | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """([B, T, width], first [B, T, width] or None) -> the same pair for the next such block."""
        mixed, first = self.mixer.values(self.mixer_norm(x), span, first)  # pyright: ignore
        return self._finish(x, mixed, span), first  # pyright: ignore


class RecallBlock(Block):
    """A block whose mixer keeps what comes in as it comes, and so takes the norm apart
    (models/attention/base.py)."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        return self._finish(x, self.mixer(x, span, self.mixer_norm), span)


def block(
    width: int, mixer: nn.Module, feedforward: nn.Module, norms: NormStyle = PRE_NORMS
) -> Block:
    """The block that a mixer asks for: it shares values, or it recalls.

    Raises:
        ValueError: norms behind the sum, around a mixer that takes its norm apart or has values of
            the first layer.
    """
    recalls = isinstance(mixer, SplitAttention) and mixer.recall is not None
    shares = hook(mixer, "shares_values")
    if norms.place == "after":
        if recalls or shares:
            raise ValueError(
                f"model.norm_place=after: {type(mixer).__name__} needs a norm before it; use"
                " model.norm_place=before"
            )
        return PostNormBlock(width, mixer, feedforward, norms)
    if shares:
        return ValueBlock(width, mixer, feedforward, norms)
    return (RecallBlock if recalls else Block)(width, mixer, feedforward, norms)


def _normed(norm: nn.Module | None, hidden: Tensor) -> Tensor:
    return hidden if norm is None else norm(hidden)
