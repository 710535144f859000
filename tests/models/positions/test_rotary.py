"""Rotary positions and their stretched forms: what is turned, and by how much."""

from math import log, pi

import pytest
import torch

from models.positions.interpolated import Interpolated
from models.positions.ntk import Ntk
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from models.span import Span

CPU, F64 = torch.device("cpu"), torch.float64
SCHEMES = [
    Rope(),
    Interpolated(4.0),
    Ntk(4.0),
    Ntk(2.0, original_length=64, context_length=256),
    Yarn(4.0, 64),
]


def span(*positions: int) -> Span:
    pos = torch.tensor([positions])
    return Span.of(pos, torch.zeros_like(pos))


def draw(tokens: int, width: int = 16) -> torch.Tensor:
    return torch.randn(
        1, tokens, 2, width, generator=torch.Generator().manual_seed(tokens), dtype=F64
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scores_depend_on_the_distance_alone(scheme):
    q, k = draw(1), draw(1) + 1
    near, far = (
        (scheme.rotate(q, span(p + 7)) * scheme.rotate(k, span(p))).sum(-1) for p in (0, 1000)
    )
    assert (near - far).abs().max() < 1e-11
    assert (
        (scheme.rotate(q, span(8)) * scheme.rotate(k, span(0))).sum(-1) - near
    ).abs().max() > 1e-3


def test_interpolation_puts_twice_the_tokens_where_the_trained_ones_were():
    x = draw(3)
    assert (
        Interpolated(2.0).rotate(x, span(0, 10, 500)) - Rope().rotate(x, span(0, 5, 250))
    ).abs().max() < 1e-12


def test_ntk_leaves_the_fastest_pair_and_slows_the_slowest_by_the_factor():
    plain, slowed = (scheme.inv_freq(16, CPU, F64) for scheme in (Rope(), Ntk(4.0)))
    ratio = plain / slowed
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(4)
    assert (ratio.diff() > 0).all()


def test_dynamic_ntk_follows_the_context_and_never_shortens_it():
    def last(**lengths):
        return (Rope().inv_freq(16, CPU, F64) / Ntk(2.0, **lengths).inv_freq(16, CPU, F64))[
            -1
        ].item()

    assert last(original_length=64, context_length=256) == pytest.approx(2 * 4 - 1)
    assert last(original_length=64, context_length=64) == pytest.approx(1)
    assert last(original_length=64, context_length=16) == pytest.approx(1)
    assert last(context_length=256) == pytest.approx(2), (
        "without an original length the factor alone counts"
    )


def test_yarn_keeps_what_turns_often_and_slows_what_turns_rarely():
    scheme, width, length = Yarn(8.0, 2048), 64, 2048
    plain = Rope().inv_freq(width, CPU, F64)
    ratio = plain / scheme.inv_freq(width, CPU, F64)
    turns = length * plain / (2 * pi)
    one = 10_000 ** (
        2 / width
    )  # a pair turns this many times as often as the next: edges are rounded outwards to pairs
    assert (ratio[turns > 32 * one] == 1).all()
    assert torch.allclose(ratio[turns < 1 / one], torch.tensor(8.0, dtype=F64))
    between = ratio[(turns < 32 / one) & (turns > one)]
    assert len(between) > 3
    assert ((between > 1) & (between < 8)).all()


def test_yarn_multiplies_logits_by_the_square_of_its_magnitude():
    x = draw(3)
    q_span = span(0, 3, 90)
    grown, plain = (
        Yarn(8.0, 64).rotate(x, q_span),
        Yarn(8.0, 64, attention_factor=1.0).rotate(x, q_span),
    )
    m = 0.1 * log(8) + 1
    assert ((grown * grown).sum(-1) - m**2 * (plain * plain).sum(-1)).abs().max() < 1e-11
    assert (plain.norm(dim=-1) - x.norm(dim=-1)).abs().max() < 1e-12


@pytest.mark.parametrize("scheme", SCHEMES)
def test_low_precision_is_rounded_once(scheme):
    x = draw(2).bfloat16()
    got, wide = scheme.rotate(x, span(3, 70_000)), scheme.rotate(x.float(), span(3, 70_000))
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wide.bfloat16())


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda: Interpolated(0.5), "factor=0.5"),
        (lambda: Ntk(0.9), "factor=0.9"),
        (lambda: Ntk(2.0, original_length=0, context_length=8), "original_length=0"),
        (lambda: Ntk(2.0, original_length=64), "context_length"),
        (lambda: Ntk(2.0).inv_freq(2, CPU, F64), "at least 4"),
        (lambda: Yarn(0.5, 64), "factor=0.5"),
        (lambda: Yarn(2.0, 4), "7 or more"),
        (lambda: Yarn(2.0, 64, beta_fast=1.0, beta_slow=2.0), "fast above slow"),
        (lambda: Yarn(2.0, 64, attention_factor=0.0), "positive"),
        (lambda: Yarn(2.0, 64, theta=1.0), "above 1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        wrong()
