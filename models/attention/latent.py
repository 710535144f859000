"""Multi-head latent attention: keys and values are stored and sent as one latent per token."""

import torch
from torch import Tensor, nn

from models.attention.base import SplitAttention
from models.attention.full import CAUSAL
from models.norms import RMSNorm
from models.positions.base import Position, require_rotary
from models.primitives.softmax import Softmax
from models.ranges import Positive
from models.scores import Score, Tensors
from models.span import Span


class LatentScore(Score):
    """Expands latents into keys and values where they are used, so that only latents travel.

    query (q [B, T, H, N + R],), payload (latent [B, S, L], rotated key [B, S, R]), params
    (up [H, N + E, L],): N channels have no position, R are rotated and shared by all heads, E is
    the width of the values.

    Args:
        nope_dim: N.
        scale: factor of the dot products; None: 1 / sqrt(N + R).
    """

    payload_heads = (None, None)
    param_heads = (0,)

    def __init__(self, nope_dim: int, scale: float | None = None):
        super().__init__(scale)
        self.nope_dim = nope_dim

    def operands(
        self, query: Tensors, payload: Tensors, params: Tensors
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See Score.operands."""
        latent, rotated_key = payload
        expanded = torch.einsum("bsl,hel->bshe", latent, params[0])
        content_key = expanded[..., : self.nope_dim]
        value = expanded[..., self.nope_dim :]
        shared_key = rotated_key[:, :, None].expand(*content_key.shape[:3], -1)
        return query[0], torch.cat([content_key, shared_key], -1), value


def latent_sizes(
    width: int,
    heads: int,
    kv_latent: int | None,
    nope_dim: int | None,
    rope_dim: int | None,
    value_dim: int | None,
) -> dict[str, int]:
    """Returns the widths of LatentAttention by name, with its own in place of None."""
    head_width = max(1, width // heads)
    return {
        "kv_latent": 2 * head_width if kv_latent is None else kv_latent,
        "nope_dim": head_width if nope_dim is None else nope_dim,
        "rope_dim": max(2, head_width // 4 * 2) if rope_dim is None else rope_dim,
        "value_dim": head_width if value_dim is None else value_dim,
    }


class LatentAttention(SplitAttention):
    """Causal attention within a document; keys and values are expanded from a shared latent.

    Args:
        width: channels of input and output.
        heads: query heads; each has keys and values of its own, expanded from the latent.
        position: must rotate queries and keys, or do nothing (rope, yarn, none, ...); it sees
            `rope_dim` channels only.
        kv_latent: channels stored per token for keys and values; null = two head widths.
        q_latent: channels that queries are squeezed through; null = not squeezed.
        nope_dim: channels of a head's query and key without position; null = width / heads.
        rope_dim: rotated channels of a head's query, and of the one key part that all heads share;
            null = half of width / heads, made even.
        value_dim: channels of a head's value; null = width / heads.
        bias: of the projections that squeeze.
        out_bias: of the projection back.
        scale: factor of the dot products; null: 1 / sqrt(nope_dim + rope_dim). Models that were
            lengthened by YaRN have a larger one (DeepSeek-V3).

    A token costs kv_latent + rope_dim numbers, in a cache or on the wire, instead of 2 x heads x
    head width.

    Source: DeepSeek-AI 2024 (arXiv:2405.04434, section 2.1). As there, a norm stands between
    squeezing and expanding, and the scale counts all channels of a key. Ours pairs channels
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
        bias: bool = False,
        out_bias: bool = False,
        scale: Positive | None = None,
    ):
        super().__init__()
        sizes = latent_sizes(width, heads, kv_latent, nope_dim, rope_dim, value_dim)
        for name, size in {**sizes, "q_latent": 1 if q_latent is None else q_latent}.items():
            if size < 1:
                raise ValueError(
                    f"{name} is a number of channels and must be 1 or more; got {size}"
                )
        kv_latent = sizes["kv_latent"]
        nope_dim = sizes["nope_dim"]
        rope_dim = sizes["rope_dim"]
        value_dim = sizes["value_dim"]

        self.position = require_rotary(position, "latent", heads, rope_dim)
        self.heads = heads
        self.kv_latent = kv_latent
        self.nope_dim = nope_dim
        self.rope_dim = rope_dim
        if q_latent is None:
            self.squeeze_q = None
            self.norm_q = None
            query_input = width
        else:
            self.squeeze_q = nn.Linear(width, q_latent, bias=bias)
            self.norm_q = RMSNorm(q_latent, eps=1e-6)
            query_input = q_latent
        self.q = nn.Linear(query_input, heads * (nope_dim + rope_dim), bias=False)
        self.squeeze = nn.Linear(width, kv_latent + rope_dim, bias=bias)
        self.norm = RMSNorm(kv_latent, eps=1e-6)
        self.up = nn.Linear(kv_latent, heads * (nope_dim + value_dim), bias=False)
        self.out = nn.Linear(heads * value_dim, width, bias=out_bias)
        self.mix = Softmax(CAUSAL, LatentScore(nope_dim, scale))

    def payload(self, hidden: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Latents [B, S, L] and the rotated part of the keys [B, S, R]."""
        latent, key = self.squeeze(hidden).split([self.kv_latent, self.rope_dim], -1)
        rotated_key = self.position.rotate(key[:, :, None], span)[:, :, 0]
        return self.norm(latent), rotated_key

    def attend(
        self, hidden: Tensor, span: Span, payload: tuple[Tensor, ...], kv_span: Span
    ) -> Tensor:
        """[B, T, width] -> [B, T, width], given the latents of the tokens of `kv_span`."""
        query_input = hidden
        if self.squeeze_q is not None and self.norm_q is not None:
            query_input = self.norm_q(self.squeeze_q(hidden))
        query = self.q(query_input).unflatten(-1, (self.heads, -1))
        rotated = self.position.rotate(query[..., self.nope_dim :], span)
        query = torch.cat([query[..., : self.nope_dim], rotated], -1)
        # The weight is a param of the score, not a layer that is called: expansion happens on the
        # rank that uses a latent, and the gradients of all ranks are summed.
        up = self.up.weight.unflatten(0, (self.heads, -1))
        output = self.mix((query,), payload, (up,), span=span, kv_span=kv_span)
        return self.out(output.flatten(-2))
