"""One layer of a decoder: a mixer, in which tokens meet, then a feed-forward layer, which works on
each in turn."""

from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.layer import Layer, hook
from models.span import Span


class Block(Layer):
    """x + mixer(norm(x)), then x + feedforward(norm(x)); Xiong et al. 2020 (arXiv:2002.04745), with
    RMS norms."""

    def __init__(self, width: int, mixer: nn.Module, feedforward: nn.Module):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(width)
        self.mixer = mixer
        self.feedforward_norm = nn.RMSNorm(width)
        self.feedforward = feedforward

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = x + self.mixer(self.mixer_norm(x), span)
        return x + self.feedforward(self.feedforward_norm(x), span)


class ValueBlock(Block):
    """A block whose mixer also hears the values of the first such layer, token by token.

    Its mixer says shares_values = True and has a method values(x, span, first) -> (y, first): first
    is None in the first of these layers, which gives its own. They travel as an argument and a
    result, so that a block can be computed again, compiled or gathered by itself.
    """

    def forward(self, x: Tensor, span: Span, first: Tensor | None = None) -> tuple[Tensor, Tensor]:  # pyright: ignore
        """([B, T, width], first [B, T, width] or None) -> the same pair for the next such block."""
        y, first = self.mixer.values(self.mixer_norm(x), span, first)  # pyright: ignore
        x = x + y
        return x + self.feedforward(self.feedforward_norm(x), span), first  # pyright: ignore


class RecallBlock(Block):
    """A block whose mixer keeps what comes in as it comes, and so takes the norm apart
    (models/attention/base.py)."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = x + self.mixer(x, span, self.mixer_norm)
        return x + self.feedforward(self.feedforward_norm(x), span)


def block(width: int, mixer: nn.Module, feedforward: nn.Module) -> Block:
    """The block that a mixer asks for: it shares values, or it recalls."""
    if hook(mixer, "shares_values"):
        return ValueBlock(width, mixer, feedforward)
    recalls = isinstance(mixer, SplitAttention) and mixer.recall is not None
    return (RecallBlock if recalls else Block)(width, mixer, feedforward)
