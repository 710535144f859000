"""What a Switch layer promises on one device: who is dropped, what depends on whom, what is left
for the trainer."""

import math

import pytest
import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.auxiliary import auxiliary_loss, on_step_begin, on_step_end, statistics
from models.cost.activation_memory import activation_bytes
from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.feedforward import SwiGLU
from models.init import initialise
from models.moe.switch import Switch, expert_capacity
from models.positions.rope import Rope
from models.span import Span
from tests.support.parity import packed

SPAN = packed([[4, 1, 9], [6, 6]], 14)


def layer(span=SPAN, **settings):
    made = initialise(
        Switch(8, 12, **{"experts": 3, "jitter": 0.0, "router_scale": 300.0, **settings}), seed=0
    ).double()
    x = torch.randn(*span.shape, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made, x


def chosen(made, x, span=SPAN):
    return made.router(x, span).argmax(-1)


@pytest.mark.parametrize(
    ("tokens", "factor", "places"),
    [(10, 1.1, 3), (10, 1.0, 2), (11, 1.0, 3), (1, 0.1, 1), (30, 1.1, 7)],
)
def test_room_is_rounded_up_in_whole_numbers(tokens, factor, places):
    """1.1 x 10 / 5 = 2.2; in floating point 1.1 x 10 is a little more than 11."""
    assert expert_capacity(torch.tensor(tokens), 5, factor).item() == places
    assert expert_capacity(torch.tensor(10), 1, 1.1).item() == 11


@pytest.mark.parametrize("over", ["document", "row"])
def test_an_expert_takes_the_first_that_come_and_the_rest_get_nothing(over):
    made, x = layer(capacity_factor=0.75, capacity_over=over)
    out, choice = made(x, SPAN), chosen(made, x)
    probs = made.router(x, SPAN).softmax(-1)
    dropped = 0
    for b in range(2):
        groups = (
            [SPAN.valid()[b]]
            if over == "row"
            else [SPAN.doc[b] == d for d in range(int(SPAN.doc[b].max()) + 1)]
        )
        for group in groups:
            places, queue = math.ceil(0.75 * int(group.sum()) / 3), {0: 0, 1: 0, 2: 0}
            for t in group.nonzero()[:, 0].tolist():
                e = int(choice[b, t])
                up, gate, down = made.experts.up[e], made.experts.gate[e], made.experts.down[e]
                want = probs[b, t, e] * (
                    down @ (torch.nn.functional.silu(gate @ x[b, t]) * (up @ x[b, t]))
                )
                want = want if queue[e] < places else torch.zeros_like(want)
                torch.testing.assert_close(out[b, t], want, rtol=0, atol=1e-14)
                dropped += queue[e] >= places
                queue[e] += 1
    assert statistics(made)["/dropped"] == dropped > 0


def test_no_document_depends_on_another_unless_they_queue_up_together():
    for over, alone in (("document", True), ("row", False)):
        made, x = layer(capacity_factor=0.5, capacity_over=over)
        first = SPAN.doc[..., None] == 0
        out = made(x, SPAN)
        moved = (made(torch.where(first, -x, x), SPAN) - out)[SPAN.doc > 0]
        assert (moved.abs().max() < 1e-12 * out.abs().max()) == alone


def test_outside_training_there_is_other_room_and_nothing_is_left():
    made, x = layer(capacity_factor=0.1, eval_capacity_factor=None, balance=1.0, z=1.0)
    some = (made(x, SPAN) != 0).any(-1).sum()
    assert auxiliary_loss(made).keys() == {"balance", "router_z"} and statistics(made)
    made.eval()
    assert (made(x, SPAN) != 0).any(-1).sum() == SPAN.valid().sum() > some
    assert auxiliary_loss(made) == {} and statistics(made) == {}
    made.train()
    with torch.no_grad():
        made(x, SPAN)
    assert auxiliary_loss(made) == {} and statistics(made) == {}


def test_jitter_and_dropout_are_there_in_training_and_are_those_of_the_step():
    made, x = layer(jitter=0.3, expert_dropout=0.5, capacity_factor=None, eval_capacity_factor=None)
    outs = []
    for step in (1, 2, 1):
        on_step_begin(made, step)
        outs.append(made(x, SPAN))
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    still, _ = layer(capacity_factor=None)
    assert torch.equal(made.eval()(x, SPAN), still.eval()(x, SPAN))


def test_jitter_multiplies_each_channel_by_a_number_near_one():
    span = Span.line(1, 500)
    made, x = layer(span, jitter=0.3)
    x = torch.nn.functional.one_hot(torch.arange(500) % 8, 8).double()[None]
    factor = made.router(x, span) / (x @ made.router.weight.T)
    assert 0.7 < factor.min() < 0.71 and 1.29 < factor.max() < 1.3


def test_dropout_leaves_the_mean_of_what_experts_give():
    span = Span.line(1, 1)
    made, x = layer(span, experts=1, expert_dropout=0.4, capacity_factor=None)
    outs = []
    for step in range(1500):
        on_step_begin(made, step)
        outs.append(made(x, span).detach())
    every = torch.cat(outs)
    spread = every.std(0) / len(outs) ** 0.5
    want = made.eval()(x, span)[0]
    assert ((every.mean(0) - want).abs() < 5 * spread).all() and spread.min() > 0


def test_the_balancing_loss_is_that_of_each_row_whatever_the_micro_batch():
    made, x = layer(balance=0.5, z=0.1)
    made(x, SPAN)
    probs, choice = made.router(x, SPAN).softmax(-1), chosen(made, x)
    want = []
    for b in range(2):
        valid = SPAN.valid()[b]
        f = torch.bincount(choice[b][valid], minlength=3) / valid.sum()
        want.append(3 * (f * probs[b][valid].mean(0)).sum())
    tokens = int(SPAN.valid().sum())
    together = auxiliary_loss(made, tokens=tokens, rows=2)
    torch.testing.assert_close(together["balance"], 0.5 * torch.stack(want).mean())
    apart = 0
    for b in range(2):
        made(x[b : b + 1], SPAN.map(lambda t, b=b: t[b : b + 1]))
        apart = apart + torch.stack(list(auxiliary_loss(made, tokens=tokens, rows=2).values()))
    torch.testing.assert_close(apart, torch.stack(list(together.values())))


def test_figures_are_worked_out_from_the_sums_of_the_step():
    made, x = layer(capacity_factor=0.5, balance=0.5, z=0.1)
    made(x, SPAN)
    losses, sums = auxiliary_loss(made, tokens=int(SPAN.valid().sum()), rows=2), statistics(made)
    load = torch.bincount(chosen(made, x)[SPAN.valid()], minlength=3).double()
    torch.testing.assert_close(sums["/load"], load)
    figures = on_step_end(
        made, {name: 3 * value for name, value in sums.items()}
    )  # of three such micro-batches
    probs = made.router(x, SPAN).softmax(-1)[SPAN.valid()]
    assert figures["load"] == pytest.approx((load.max() / load.mean()).item())
    assert figures["entropy"] == pytest.approx((-(probs * probs.log()).sum(-1).mean()).item())
    assert figures["dropped"] == pytest.approx((sums["/dropped"] / load.sum()).item())
    assert figures["balance"] == pytest.approx(2 * losses["balance"].item())
    assert figures["z"] == pytest.approx(10 * losses["router_z"].item())


def test_even_choices_cost_one_and_the_router_learns_through_its_probability():
    made, x = layer(balance=1.0, z=0.0)
    with torch.no_grad():
        made.router.weight.zero_()
    made(x, SPAN)
    assert auxiliary_loss(made, rows=2)["balance"].item() == pytest.approx(1.0)
    made, x = layer(balance=0.0, z=0.0)
    made(x, SPAN).sum().backward()
    assert made.router.weight.grad.abs().max() > 0


def test_padding_may_hold_anything():
    span = packed([[3], []], 5)
    made, x = layer(span, balance=1.0, z=1.0)
    x[~span.valid()] = torch.nan
    x.requires_grad_()
    out = made(x, span)
    (out.sum() + sum(auxiliary_loss(made).values())).backward()
    assert out.isfinite().all() and (x.grad[~span.valid()] == 0).all()
    assert all(p.grad.isfinite().all() for p in made.parameters())


def test_the_router_stays_exact_in_a_model_of_bfloat16():
    made, x = layer(capacity_factor=None)
    made, x = made.bfloat16(), x.bfloat16()
    assert made.router(x, SPAN).dtype == torch.float32
    assert made(x, SPAN).dtype == torch.bfloat16


def test_the_router_starts_smaller_and_the_output_by_the_depth():
    made = initialise(Switch(64, 64, layers=8, experts=4), seed=0)
    assert made.router.weight.std().item() == pytest.approx(0.002, rel=0.2)
    assert made.experts.down.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert made.experts.up.std().item() == pytest.approx(0.02, rel=0.05)


def test_what_a_token_visits_is_what_counts():
    made = Switch(8, 12, experts=4)
    assert count_parameters(made).total == 4 * 3 * 8 * 12 + 4 * 8
    assert count_parameters(made).active == 3 * 8 * 12 + 4 * 8


def test_a_model_with_experts_costs_what_the_dense_one_costs_and_its_routers():
    def decoder(switch):
        parts = [
            Switch(8, 12, experts=4) if switch and layer else SwiGLU(8, 12) for layer in range(2)
        ]
        return Decoder(11, 8, [Attention(8, 2, 1, Rope()) for _ in parts], parts)

    span = packed()
    dense, sparse = (count_flops(decoder(switch)).training(span) for switch in (False, True))
    assert sparse - dense == 3 * 2 * 4 * 8 * int(span.valid().sum())
    kept = activation_bytes(decoder(True), 128)
    assert activation_bytes(decoder(False), 128) < kept < 2 * activation_bytes(decoder(False), 128)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"capacity_factor": 0}, "must be above 0"),
        ({"capacity_over": "batch"}, "choose one"),
        ({"jitter": 1.0}, "must be 0 or more and below 1"),
        ({"expert_dropout": 1.0}, "a share of channels must be"),
        ({"balance": -1}, "must be 0 or more"),
        ({"activation": "gelu"}, "choose one of swiglu, relu"),
        ({"experts": 0}, "1 or more"),
        ({"router_scale": 0}, "must be above 0"),
        ({"hidden": 0}, "must be 1 or more"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Switch(8, 12, **settings)
