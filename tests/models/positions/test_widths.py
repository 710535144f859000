"""Heads that a rotary position cannot turn are refused when the layer is built, not in the first
step of a rank."""

import pytest
import torch

from models.attention.compressed import Compressed
from models.attention.full import Attention
from models.positions.interpolated import Interpolated
from models.positions.ntk import Ntk
from models.positions.rope import Rope
from models.positions.yarn import Yarn

TURNING = [Rope(), Interpolated(2.0), Ntk(2.0), Yarn(2.0, original_length=64)]


@pytest.mark.parametrize("position", TURNING, ids=lambda position: type(position).__name__)
def test_heads_of_an_odd_width_are_refused_when_built(position):
    Attention(8, 2, 1, position)
    with pytest.raises(ValueError, match=r"even|at least 4"), torch.device("meta"):
        Attention(6, 2, 1, position)


def test_a_longer_base_needs_two_pairs_wherever_it_turns():
    with pytest.raises(ValueError, match="at least 4 channels"):
        Attention(4, 2, 1, Ntk(2.0))
    with pytest.raises(ValueError, match="at least 4 channels"):
        Compressed(8, 2, Ntk(2.0), rope_dim=2)
