"""Positions that are added to the token embeddings."""

from math import cos, sin

import pytest
import torch

from models.positions.learned import Learned
from models.positions.sinusoidal import Sinusoidal
from models.span import Span
from tests.support.parity import packed


@pytest.mark.parametrize("width", [6, 7])
def test_waves_are_sines_and_cosines_by_turns(width):
    module, span = Sinusoidal(amplitude=1.0).embedding(width), packed()
    got = module.double()(span)
    assert got.shape == (2, 51, width)
    for token in (0, 20, 37):
        pos = int(span.pos[0, token])
        want = [
            (cos if i % 2 else sin)(pos / 10_000 ** (2 * (i // 2) / width)) for i in range(width)
        ]
        assert got[0, token].tolist() == pytest.approx(want, abs=1e-12)


def test_waves_are_as_large_as_asked_and_own_no_parameter():
    small, large = Sinusoidal().embedding(8), Sinusoidal(amplitude=1.0).embedding(8)
    span = packed()
    assert torch.allclose(small(span), large(span) * 0.02)
    assert not list(small.state_dict()), "a wave is no weight: checkpoints do not hold it"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_waves_have_the_dtype_of_their_model(dtype):
    got = Sinusoidal(amplitude=1.0).embedding(8).to(dtype)(Span.line(1, 2000))
    want = Sinusoidal(amplitude=1.0).embedding(8).double()(Span.line(1, 2000))
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() < {
        torch.float64: 1e-15,
        torch.float32: 2e-4,
        torch.bfloat16: 5e-3,
    }[dtype]


def test_a_learned_position_is_a_row_of_the_table():
    module, span = Learned(64).embedding(8), packed()
    got = module(span)
    assert torch.equal(got[0, 14:38], module.table.weight[:24])
    got[0, 20].sum().backward()
    assert module.table.weight.grad.nonzero()[:, 0].unique().tolist() == [6]


def test_a_learned_table_is_as_long_as_the_context_or_longer():
    assert Learned(64).max_length == Learned(64).embedding(8).max_length == 64
    assert Learned(64, 100).embedding(8).table.weight.shape == (100, 8)
    with pytest.raises(ValueError, match=r"use position\.max_length=64"):
        Learned(64, 63)


@pytest.mark.parametrize(
    "wrong", [lambda: Sinusoidal(theta=1.0), lambda: Sinusoidal(amplitude=0.0)]
)
def test_a_setting_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"above 1|positive"):
        wrong()
