"""What a layer of several experts a token promises on one device."""

import pytest
import torch
from torch.nn import functional as F

from models.auxiliary import auxiliary_loss, on_step_end, reset_auxiliary, statistics
from models.init import initialise
from models.moe.topk import TopKMixture
from models.span import PADDING, READ, TEXT, WRITE, Span
from tests.support.parity import packed

SPAN = packed([[4, 1, 9], [6, 6]], 14)


def layer(**settings):
    made = initialise(
        TopKMixture(8, 12, **{"experts": 5, "router_scale": 100.0, **settings}), seed=0
    ).double()
    return made, torch.randn(
        *SPAN.shape, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def spelled(made, x, score, top):
    """Token by token."""
    logits, out = x @ made.router.weight.T, torch.zeros_like(x)
    for b, t in SPAN.valid().nonzero().tolist():
        scores = logits[b, t].softmax(-1) if score == "softmax" else logits[b, t].sigmoid()
        bias = 0 if made.bias is None else made.bias
        best = (scores + bias).topk(top).indices
        weights = scores[best] / scores[best].sum()
        for e, weight in zip(best.tolist(), weights):
            inner = F.silu(made.experts.gate[e] @ x[b, t]) * (made.experts.up[e] @ x[b, t])
            out[b, t] += made.scaling * weight * (made.experts.down[e] @ inner)
        if made.shared is not None:
            out[b, t] += made.shared(x[b, t], SPAN)
    return out


@pytest.mark.parametrize(
    ("score", "top", "shared", "bias_speed"), [("softmax", 2, 0, 0), ("sigmoid", 3, 2, 0.3)]
)
def test_a_token_gets_its_best_experts_by_weight_and_the_shared_ones(
    score, top, shared, bias_speed
):
    made, x = layer(score=score, top=top, shared=shared, bias_speed=bias_speed, scaling=1.5)
    if made.bias is not None:
        made.bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.2, -0.2]))
    torch.testing.assert_close(
        made(x, SPAN), spelled(made, x, score, top) * SPAN.valid()[..., None], rtol=0, atol=1e-13
    )
    assert statistics(made)["/dropped"] == 0


def spelled_choice(made, logits, top):
    """({expert: weight}) of one token with every option of the choice."""
    scores = logits.softmax(-1) if made.rule.score == "softmax" else logits.sigmoid()
    ranked = scores if made.bias is None else scores + made.bias
    size = len(ranked) // made.rule.groups
    strengths = []
    for group in range(made.rule.groups):
        members = sorted(ranked[group * size : (group + 1) * size].tolist(), reverse=True)
        strengths.append(sum(members[:2]))
    best = sorted(range(made.rule.groups), key=lambda group: -strengths[group])[
        : made.rule.top_groups
    ]
    allowed = [e for e in range(len(ranked)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: -ranked[e].item())[:top]
    total = scores[chosen].sum() if made.rule.normalised else 1
    return {e: scores[e] / total for e in chosen}


OSS = {"activation": "clamped_swiglu", "expert_bias": True, "router_bias": True, "top": 2}
OSS = {**OSS, "swiglu_alpha": 1.3, "swiglu_limit": 0.4}


@pytest.mark.parametrize(
    "settings",
    [
        {"score": "sigmoid", "groups": 3, "top_groups": 2, "top": 3, "choice_bias": True},
        {"score": "sigmoid", "groups": 2, "top_groups": 1, "normalised": False, "scaling": 2.5},
        {"normalised": False, "activation": "relu", "expert_bias": True},
        OSS,
    ],
    ids=["groups and a bias", "groups", "softmax over all", "biases and clamps"],
)
def test_options_of_the_choice_and_of_the_experts(settings):
    made, x = layer(**{**settings, "experts": 6})
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
            if "bias" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype))
    if made.bias is not None:
        before = made.bias.clone()
    out = torch.zeros_like(x)
    experts = made.experts
    for b, t in SPAN.valid().nonzero().tolist():
        logits = made.router.weight @ x[b, t]
        if made.router.bias is not None:
            logits = logits + made.router.bias
        for e, weight in spelled_choice(made, logits, made.rule.top).items():
            up = experts.up[e] @ x[b, t]
            gate = experts.gate[e] @ x[b, t] if experts.gate is not None else None
            if experts.up_bias is not None:
                up = up + experts.up_bias[e]
            if gate is None:
                inner = up.clamp(min=0)
            elif experts.gate_bias is None:
                inner = F.silu(gate) * up
            else:
                gate = (gate + experts.gate_bias[e]).clamp(max=0.4)
                inner = gate * torch.sigmoid(1.3 * gate) * (up.clamp(-0.4, 0.4) + 1)
            down = experts.down[e] @ inner
            if experts.down_bias is not None:
                down = down + experts.down_bias[e]
            out[b, t] += made.scaling * weight * down
    torch.testing.assert_close(made(x, SPAN), out, rtol=0, atol=1e-12)
    on_step_end(made, statistics(made))
    if made.bias is not None:
        assert torch.equal(made.bias, before)  # its speed is 0


def test_the_bias_moves_towards_an_even_load_and_takes_part_in_the_choice_alone():
    made, x = layer(top=2, score="sigmoid", bias_speed=0.05)
    x = x + 1  # tokens that are like each other choose alike
    before = made(x, SPAN)
    sums = statistics(made)
    load = sums["/load"]
    figures = on_step_end(made, sums)
    torch.testing.assert_close(made.bias, 0.05 * (load.mean() - load).sign())
    assert figures["load"] > 1.2
    for _ in range(60):
        made(x, SPAN)
        last = on_step_end(made, statistics(made))["load"]
    assert last < figures["load"]
    assert made.state_dict()["bias"].abs().max() > 0
    made.bias.fill_(7.0)  # the same for all: no choice changes, and no weight
    torch.testing.assert_close(made(x, SPAN), before)


def test_what_is_left_adds_up_until_it_is_taken_or_forgotten():
    made, x = layer(balance=1.0, z=1.0)
    rows = [(x[b : b + 1], SPAN.map(lambda t, b=b: t[b : b + 1])) for b in range(2)]
    apart = []
    for row in rows:
        made(*row)
        apart.append(auxiliary_loss(made) | statistics(made))
    made(x, SPAN)
    reset_auxiliary(made)
    for row in rows:
        made(*row)
    together = auxiliary_loss(made) | statistics(made)
    assert together.keys() == apart[0].keys()
    for name, value in together.items():
        torch.testing.assert_close(value, apart[0][name] + apart[1][name])
    assert auxiliary_loss(made) == {} and statistics(made) == {}


def test_of_segments_only_those_with_text_count_and_by_their_tokens():
    """As memory=tokens has them: memory tokens before and behind, of rows that have no segment at
    this turn too."""
    made, x = layer(balance=1.0, z=1.0)
    role = torch.full_like(SPAN.role, TEXT)
    role[:, :2], role[:, -2:] = READ, WRITE
    doc = torch.zeros_like(SPAN.doc)
    doc[1, 2:-2] = PADDING
    made(x, Span(SPAN.pos, doc, role))
    found, sums = auxiliary_loss(made, tokens=14, rows=1000), statistics(made)
    first = Span.line(1, 14)
    made(x[:1], first)
    want = auxiliary_loss(made, tokens=14)
    torch.testing.assert_close(found["balance"], want["balance"])
    torch.testing.assert_close(found["router_z"], want["router_z"])
    assert (
        sums["/tokens"] == 14
        and sums["/load"].sum() == 28
        and sums["/dropped"] == 0
        and sums["/rows"] == 1
    )


def test_without_a_bias_none_is_kept():
    assert "bias" not in layer()[0].state_dict()


def test_a_model_built_without_memory_starts_without_favour():
    with torch.device("meta"):
        made = TopKMixture(8, 12, bias_speed=0.1, jitter=0.1)
    made.to_empty(device="cpu")
    for module in made.modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
    assert (made.bias == 0).all() and made.router.chance.step == 0


def test_a_token_costs_what_the_dense_layer_costs_by_default():
    made = TopKMixture(8, 12, experts=4, top=2, shared=1)
    assert made.experts.hidden == 4 and made.shared.up.out_features == 4


def test_even_choices_of_several_experts_cost_one():
    made, x = layer(balance=1.0, top=2)
    with torch.no_grad():
        made.router.weight.zero_()
    made(x, SPAN)
    assert auxiliary_loss(made, rows=2)["balance"].item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"top": 6}, "experts of a token=6"),
        ({"score": "tanh"}, "softmax or sigmoid"),
        ({"shared": -1}, "0 or more"),
        ({"bias_speed": -0.1}, "0 or more"),
        ({"groups": 2, "top_groups": 1}, "must lie in groups of the same size"),
        ({"experts": 6, "groups": 3, "top_groups": 1, "top": 3}, "3 experts of a token"),
        ({"swiglu_limit": 3.0}, "activation=clamped_swiglu"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        layer(**settings)
