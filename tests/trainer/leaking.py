"""Layers as users write them: some mix tokens by themselves, which no driver can spread."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import Attention
from models.span import Span


class PlainAttention(nn.Module):
    """Scaled dot products of torch, causal, blind to documents."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.inner, self.out = (
            heads,
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inner(x).chunk(3, -1)
        )
        return self.out(
            F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )


class Careful(PlainAttention):
    """The same with a mask of documents: no leak, but on every rank its own part of the row."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.inner(x).chunk(3, -1)
        )
        same = span.doc[:, None, :, None] == span.doc[:, None, None, :]
        seen = same & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.out(
            F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        )


class Recurrent(nn.Module):
    """A GRU over the whole row."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.GRU(width, width, batch_first=True)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return self.inner(x)[0]


class Ahead(nn.Module):
    """A convolution that sees the token after."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Conv1d(width, width, 3, padding=1)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


class Centred(nn.Module):
    """A feed-forward layer that takes the mean over the row away."""

    def __init__(self, width: int):
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, span: Span | None = None) -> Tensor:
        return self.inner(x - x.mean(1, keepdim=True))


class Scaled(Attention):
    """Our attention with a factor: mixes by a primitive alone."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        return 2 * super().forward(x, span)


class Local(Centred):
    """A feed-forward layer that looks at each token by itself."""

    def forward(self, x: Tensor, span: Span | None = None) -> Tensor:
        return self.inner(x).relu()


class Branching(nn.Module):
    """A layer whose second matrix serves documents of several tokens alone."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        y = self.first(x)
        return y + self.second(x) if (span.pos > 0).any() else y


class Tied(Branching):
    """The same with a gradient of zero where the second matrix does not serve."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        several = (span.pos > 0).any(1)[:, None, None]
        return self.first(x) + torch.where(several, self.second(x), 0)


class Choking(Branching):
    """A layer that cannot read a row of padding."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        if not span.valid().any():
            raise ValueError("there is nothing to read")
        return self.first(x) + self.second(x)


class SingleOnly(Branching):
    """The branching layer, for those who compute in float32 alone."""

    def forward(self, x: Tensor, span: Span) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("float32 is needed")
        return super().forward(x, span)
