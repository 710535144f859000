"""Random numbers that belong to a place: even, unlike each other, and the same in whatever order
they are asked for."""

import torch

from models.counter_rng import CounterRNG, address, mix_bits
from tests.support.parity import packed


def drawn(seed=0, purpose="test", layer=0, step=1, channels=64, where=None):
    chance = CounterRNG(seed, purpose, layer)
    chance.on_step_begin(step)
    return chance(torch.arange(4096) if where is None else where, channels)


def test_numbers_are_even_and_do_not_hang_together():
    x = drawn()
    assert 0 <= x.min() < 1e-4 and 1 - 1e-4 < x.max() < 1
    counts = torch.histc(x.float(), bins=64, min=0, max=1)
    assert ((counts - 4096).abs() < 6 * 64).all()  # six deviations of a fair draw
    shifted = x - 0.5
    for a, b in ((shifted[1:], shifted[:-1]), (shifted[:, 1:], shifted[:, :-1])):
        assert abs((a * b).mean() * 12) < 0.012  # a fair draw: 0 +- 0.002


def test_a_number_depends_on_everything_it_says_and_on_nothing_else():
    base = drawn()
    for other in ({"seed": 1}, {"purpose": "else"}, {"layer": 1}, {"step": 2}):
        assert (drawn(**other) == base).float().mean() < 1e-3
    order = torch.randperm(4096)
    assert torch.equal(drawn(where=order), base[order])
    assert torch.equal(drawn(channels=3), base[:, :3])


def test_an_address_is_of_one_token_in_a_row():
    span = packed()
    for row, valid in zip(address(span), span.valid()):
        assert len(row[valid].unique()) == int(valid.sum())


def test_mixing_is_one_to_one():
    x = torch.cat([torch.arange(-5000, 5000), torch.arange(5000) << 40])
    assert len(mix_bits(x).unique()) == len(x.unique())
