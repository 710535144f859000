"""Latent attention: what it computes, what travels, and what it refuses."""

import pytest
import torch

from models.attention.latent import LatentAttention
from models.init import initialise
from models.positions.base import Position
from models.positions.rope import Rope
from models.scores import Score
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layout
from parallel.sharding import shard_span
from tests.support.pool import ranks


def _layer() -> LatentAttention:
    return initialise(
        LatentAttention(
            16, 4, Rope(), kv_latent=6, q_latent=5, nope_dim=4, rope_dim=2, value_dim=3
        ),
        seed=0,
    ).double()


def test_it_equals_attention_in_the_space_of_the_latents():
    layer, span = _layer(), Span.line(2, 11)
    x = torch.randn(2, 11, 16, dtype=torch.float64) * 3
    q = layer.q(layer.norm_q(layer.squeeze_q(x))).unflatten(-1, (4, 6))
    latent, key = layer.squeeze(x).split([6, 2], -1)
    latent, key = layer.norm(latent), layer.position.rotate(key[:, :, None], span)
    up_key, up_value = layer.up.weight.unflatten(0, (4, 7)).split([4, 3], 1)
    absorbed = torch.einsum("bthn,hnl->bthl", q[..., :4], up_key)
    logits = torch.einsum("bthl,bsl->bhts", absorbed, latent)
    logits = logits + torch.einsum(
        "bthr,bsr->bhts", layer.position.rotate(q[..., 4:], span), key[:, :, 0]
    )
    future = torch.ones(11, 11, dtype=torch.bool).triu(1)
    weights = (logits / 6**0.5).masked_fill(future, -torch.inf).softmax(-1)
    mean = torch.einsum("bhts,bsl->bthl", weights, latent)
    want = layer.out(torch.einsum("bthl,hel->bthe", mean, up_value).flatten(-2))
    torch.testing.assert_close(layer(x, span), want, rtol=0, atol=1e-13)


def _sent(env, heads):
    layer = initialise(
        LatentAttention(16, heads, Rope(), kv_latent=6, nope_dim=4, rope_dim=2, value_dim=3), seed=0
    ).double()
    communicator = apply_context_parallel(layer, env.group, "ring")
    span = Span.line(1, 24)
    here = shard_span(span, [layout("zigzag", 24, env.size)], env.rank)
    layer(torch.randn(1, 24 // env.size, 16, dtype=torch.float64), here)
    return communicator.bytes_sent["ring"]


def test_only_latents_go_round_the_ring_however_many_heads():
    for heads in (2, 4):
        assert (
            ranks(3, _sent, heads) == [2 * 8 * (6 + 2) * 8] * 3
        )  # hops x tokens x channels x bytes


class _Shaping(Position):
    def score(self, heads, head_width):
        class Other(Score):
            pass

        return Other(), None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"position": _Shaping()}, "shapes scores; use position=rope"),
        ({"position": Rope(), "rope_dim": 3}, "even number"),
        ({"position": Rope(), "kv_latent": 0}, "kv_latent is a number of channels"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LatentAttention(16, 4, **settings)
