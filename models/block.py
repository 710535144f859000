"""One layer of a decoder: a mixer, in which tokens meet, then a feed-forward layer, in which they do not."""

from torch import Tensor, nn

from models.span import Span


class Block(nn.Module):
    """x + mixer(norm(x)), then x + feedforward(norm(x)); Xiong et al. 2020 (arXiv:2002.04745), with RMS norms."""

    def __init__(self, width: int, mixer: nn.Module, feedforward: nn.Module):
        super().__init__()
        self.mixer_norm, self.mixer = nn.RMSNorm(width), mixer
        self.feedforward_norm, self.feedforward = nn.RMSNorm(width), feedforward

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = x + self.mixer(self.mixer_norm(x), span)
        return x + self.feedforward(self.feedforward_norm(x))
