"""Multi-head latent attention: keys and values are kept, and sent, as one small latent a token."""

import torch
from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.attention.full import CAUSAL
from models.positions.base import Position, require_rotary
from models.primitives.softmax import Softmax
from models.scores import Score, Tensors
from models.span import Span


class LatentScore(Score):
    """Expands latents into keys and values where they are used, so that only latents travel.

    query (q [B, T, H, N + R],), payload (latent [B, S, L], turned [B, S, R]), params (up [H, N + E,
    L],), where N is the width without and R the width with a position, and E the width of the
    values. All heads share the turned part.

    Args:
        content: N.
    """

    payload_heads = (None, None)
    param_heads = (0,)

    def __init__(self, content: int):
        super().__init__()
        self.content = content

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        latent, turned = payload
        expanded = torch.einsum("bsl,hel->bshe", latent, params[0])
        key = expanded[..., : self.content]
        value = expanded[..., self.content :]
        return query[0], torch.cat([key, turned[:, :, None].expand(*key.shape[:3], -1)], -1), value


class LatentAttention(SplitAttention):
    """Causal attention within a document over keys and values that are expanded from a shared
    latent.

    Args:
        width: of what comes in and goes out.
        heads: query heads; each has keys and values of its own, expanded from the latent.
        position: must turn queries and keys, or do nothing (rope, yarn, none, ...): only `turned`
            channels are given to it.
        kv_latent: width of what is kept of a token for keys and values; null = two head widths.
        q_latent: width that queries are squeezed through; null = not squeezed.
        nope_dim: channels of a head's query and key that know no position; null = width / heads.
        rope_dim: channels of a head's query, and of the one key part that all heads share, that the
            position turns; null = half of width / heads, made even.
        value_dim: channels of a head's value; null = width / heads.

    A token costs latent + turned numbers, in a cache or on the wire, instead of 2 x heads x head
    width.

    Source: DeepSeek-AI 2024 (arXiv:2405.04434, section 2.1). As there, a norm stands between
    squeezing and expanding and the scale counts content and turned channels. Ours pairs channels
    (i, i + R/2), theirs (2i, 2i + 1): a fixed permutation.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        position: Position,
        *,
        kv_latent: int | None = None,
        q_latent: int | None = None,
        nope_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
    ):
        super().__init__()
        each = max(1, width // heads)
        sizes = {
            "kv_latent": 2 * each if kv_latent is None else kv_latent,
            "nope_dim": each if nope_dim is None else nope_dim,
            "rope_dim": max(2, each // 4 * 2) if rope_dim is None else rope_dim,
            "value_dim": each if value_dim is None else value_dim,
        }
        for name, size in {**sizes, "q_latent": 1 if q_latent is None else q_latent}.items():
            if size < 1:
                raise ValueError(
                    f"{name} is a number of channels and must be 1 or more; got {size}"
                )
        self.position = require_rotary(position, "latent", heads, sizes["rope_dim"])
        self.heads = heads
        self.sizes = sizes
        query = heads * (sizes["nope_dim"] + sizes["rope_dim"])
        self.squeeze_q = None if q_latent is None else nn.Linear(width, q_latent, bias=False)
        self.norm_q = None if q_latent is None else nn.RMSNorm(q_latent, eps=1e-6)
        self.q = nn.Linear(width if q_latent is None else q_latent, query, bias=False)
        self.squeeze = nn.Linear(width, sizes["kv_latent"] + sizes["rope_dim"], bias=False)
        self.norm = nn.RMSNorm(sizes["kv_latent"], eps=1e-6)
        self.up = nn.Linear(
            sizes["kv_latent"], heads * (sizes["nope_dim"] + sizes["value_dim"]), bias=False
        )
        self.out = nn.Linear(heads * sizes["value_dim"], width, bias=False)
        self.mix = Softmax(CAUSAL, LatentScore(sizes["nope_dim"]))

    def payload(self, x: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Latents [B, S, L] and the key part [B, S, R] that the position turns."""
        latent, key = self.squeeze(x).split([self.sizes["kv_latent"], self.sizes["rope_dim"]], -1)
        return self.norm(latent), self.position.rotate(key[:, :, None], span)[:, :, 0]

    def attend(self, x: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width], given the latents of the tokens `of`."""
        content = self.sizes["nope_dim"]
        turned = self.sizes["rope_dim"]
        squeezed = (
            x if self.squeeze_q is None or self.norm_q is None else self.norm_q(self.squeeze_q(x))
        )
        q = self.q(squeezed).unflatten(-1, (self.heads, content + turned))
        q = torch.cat([q[..., :content], self.position.rotate(q[..., content:], span)], -1)
        up = self.up.weight.unflatten(0, (self.heads, content + self.sizes["value_dim"]))
        return self.out(self.mix((q,), payload, (up,), span=span, kv_span=kv_span).flatten(-2))
