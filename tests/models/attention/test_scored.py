"""Layers that differ from full attention in their logits, or in what becomes of the means."""

from math import exp

import pytest
import torch
from torch.nn import functional as F

from models.attention.differential import Differential
from models.attention.full import CAUSAL, Attention
from models.attention.functional import (
    attention_lse,
    attention_scores,
    attention_weights,
    masked_scores,
    scaled_scores,
)
from models.attention.gated import Gated
from models.attention.qk_norm import QKNorm
from models.attention.sink_logit import SinkLogit
from models.attention.softcap import Softcap
from models.masks.algebra import visible
from models.positions.alibi import Alibi
from models.positions.none import NoPosition
from models.positions.rope import Rope
from models.positions.t5 import T5
from tests.support.spelled_out_attention import HEADS, KV, WIDTH, furthest, given, spelled


@pytest.mark.parametrize("position", [Rope, Alibi, lambda: T5(8, 20)])
def test_a_sink_takes_its_share_of_every_mean(position):
    layer, x, span = given(SinkLogit(WIDTH, HEADS, HEADS, position()))
    layer.out.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    before = layer(x, span)
    layer.tables.logit.data = torch.linspace(-1, 3, HEADS, dtype=torch.float64)
    plain, _, _ = given(Attention(WIDTH, HEADS, HEADS, position()))
    state = {
        key.replace("tables.inner", "tables"): value
        for key, value in layer.state_dict().items()
        if "logit" not in key
    }
    plain.load_state_dict(state)
    q, k = (
        plain.position.rotate(project(x).unflatten(-1, (-1, 4)), span)
        for project in (plain.q, plain.k)
    )
    params = plain.tables() if plain.tables is not None else ()
    logits = plain.mix.score.logits((q,), (k, k), params, span, span, torch.arange(HEADS))
    if isinstance(plain.position, Alibi):
        assert (logits - scaled_scores(attention_scores(q, k), 4)).abs().max() > 1
    lse = attention_lse(masked_scores(logits, visible(CAUSAL, span, span))).transpose(1, 2)
    kept = torch.sigmoid(lse - layer.tables.logit).repeat_interleave(4, 2)
    assert furthest(layer(x, span), plain(x, span) * kept, span) < 1e-12
    assert furthest(before, layer(x, span), span) > 1e-3


def test_a_soft_cap_bends_logits_before_the_mask():
    layer, x, span = given(Softcap(WIDTH, HEADS, KV, Rope(), cap=0.7))
    want = spelled(layer, x, span, CAUSAL, lambda s: (s / 0.7).tanh() * 0.7)
    assert furthest(layer(x, span), want, span) < 1e-12
    assert furthest(layer(x, span), spelled(layer, x, span, CAUSAL), span) > 1e-3


def test_a_soft_cap_far_above_the_logits_changes_nothing():
    layer, x, span = given(Softcap(WIDTH, HEADS, KV, Rope(), cap=1e6))
    assert furthest(layer(x, span), spelled(layer, x, span, CAUSAL), span) < 1e-9


def test_normed_queries_and_keys_do_not_grow_with_the_weights():
    layer, x, span = given(QKNorm(WIDTH, HEADS, KV, Rope(), eps=1e-20))
    before = layer(x, span)
    layer.q.weight.data *= 7
    layer.k.weight.data *= 0.3
    assert furthest(layer(x, span), before, span) < 1e-12
    layer.q_norm.weight.data *= 2
    assert furthest(layer(x, span), before, span) > 1e-3


def test_a_gate_stands_between_the_means_and_the_projection():
    layer, x, span = given(Gated(WIDTH, HEADS, KV, Rope()))
    got, out = layer(x, span), layer.out.weight.data.clone()
    layer.out.weight.data = torch.eye(WIDTH, dtype=torch.float64)
    want = spelled(layer, x, span, CAUSAL) * torch.sigmoid(layer.gate(x))
    assert furthest(got, want @ out.T, span) < 1e-12


@pytest.mark.every_case
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("position", [NoPosition, Rope, Alibi, lambda: T5(8, 20)])
def test_differential_attention_is_two_softmaxes_a_pair(position, kv_heads):
    layer, x, span = given(Differential(WIDTH, HEADS, kv_heads, position(), layer=2))
    groups, share, width = kv_heads // 2, HEADS // kv_heads, 4
    q = layer.position.rotate(layer.q(x).unflatten(-1, (HEADS, width)), span).unflatten(
        2, (groups, 2, share)
    )
    k = layer.position.rotate(layer.k(x).unflatten(-1, (kv_heads, width)), span).unflatten(
        2, (groups, 2)
    )
    v = layer.v(x).unflatten(-1, (groups, 2 * width))
    seen, made = visible(CAUSAL, span, span)[:, 0], position().score(HEADS // 2, width)[0]
    lambdas = [layer.get_parameter(f"lambda_{name}") for name in ("q1", "k1", "q2", "k2")]
    start = 0.8 - 0.6 * exp(-0.6)
    weight = (lambdas[0] @ lambdas[1]).exp() - (lambdas[2] @ lambdas[3]).exp() + start
    outs = []
    for group in range(groups):
        for one in range(share):
            pair, maps = group * share + one, []
            for side in range(2):
                scores = (
                    torch.einsum("btd,bsd->bts", q[:, :, group, side, one], k[:, :, group, side])
                    / 2
                )
                bias = made.bias(span, span, torch.tensor([pair]), scores.dtype)
                if isinstance(layer.position, T5):
                    bias = layer.tables.table[made.bucket(span, span)][..., pair][:, None]
                maps.append(
                    attention_weights(
                        masked_scores(scores, seen, None if bias is None else bias[:, 0])
                    )
                )
            outs.append(
                F.rms_norm(
                    (maps[0] - weight * maps[1]) @ v[:, :, group], (8,), layer.norm.weight, 1e-5
                )
            )
    want = layer.out(torch.cat(outs, -1) * (1 - start))
    assert furthest(layer(x, span), want, span) < 1e-11


def test_lambda_starts_higher_in_deeper_layers():
    starts = [Differential(WIDTH, HEADS, HEADS, Rope(), layer=layer).start for layer in (0, 1, 20)]
    assert starts == pytest.approx([0.2, 0.8 - 0.6 * 2.718281828**-0.3, 0.7985], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Softcap(WIDTH, HEADS, KV, Rope(), cap=0.0), "positive"),
        (lambda: QKNorm(WIDTH, HEADS, KV, Rope(), eps=0.0), "positive"),
        (lambda: Differential(WIDTH, HEADS, 3, Rope(), layer=0), "even numbers"),
        (lambda: Differential(WIDTH, HEADS, 4, Rope(), layer=0), "even divisor"),
        (lambda: Differential(WIDTH, 10, 2, Rope(), layer=0), "multiple of 10"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
