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
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        layer(**settings)
