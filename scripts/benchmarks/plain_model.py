"""The quickstart's model as a user would write it without this project, in PyTorch alone.

Scaled dot-product attention of PyTorch, rotary positions, RMS norms and SwiGLU: as many parameters,
as many FLOPs. Nothing of models/ is used, so that it is something to be held against.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROTARY_BASE = 10_000.0


class PlainBlock(nn.Module):
    """Attention, then SwiGLU, each behind a norm and added to what came in.

    Args:
        width: of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        ffn: width inside the feed-forward layer.
    """

    def __init__(self, width: int, heads: int, kv_heads: int, ffn: int):
        super().__init__()
        self.heads = heads
        self.kv_heads = kv_heads
        head_width = width // heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * head_width, bias=False)
        self.value = nn.Linear(width, kv_heads * head_width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.feedforward_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, ffn, bias=False)
        self.up = nn.Linear(width, ffn, bias=False)
        self.down = nn.Linear(ffn, width, bias=False)

    def forward(
        self, hidden: Tensor, rotation: tuple[Tensor, Tensor], mask: Tensor | None
    ) -> Tensor:
        """[B, T, width] -> [B, T, width]; mask [B, 1, T, T], True where seen; None = causal."""
        normed = self.attention_norm(hidden)
        query = rotated(
            self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2), rotation
        )
        key = rotated(self.key(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2), rotation)
        value = self.value(normed).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(2))
        normed = self.feedforward_norm(hidden)
        return hidden + self.down(F.silu(self.gate(normed)) * self.up(normed))


class PlainDecoder(nn.Module):
    """A decoder that gives the mean loss of its rows.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream.
        layers: their number.
        heads: of queries.
        kv_heads: of keys and values.
        ffn: width inside a feed-forward layer.
        context: longest row.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        kv_heads: int,
        ffn: int,
        context: int,
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, kv_heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        half = torch.arange(0, width // heads, 2) / (width // heads)
        angles = torch.arange(context)[:, None] * ROTARY_BASE**-half
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T] tokens and targets -> []; see PlainBlock for the mask."""
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, (self.cosine, self.sine), mask)
        logits = self.head(self.norm(hidden))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotated(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """[B, H, T, D] -> [B, H, T, D]: turned by the position (Su et al. 2021, arXiv:2104.09864)."""
    cosine, sine = rotation
    first, second = heads.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


def document_mask(documents: Tensor) -> Tensor:
    """[B, T] -> [B, 1, T, T]: True where a token is of the same document and not later."""
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]
