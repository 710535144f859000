"""What others look for in a module counts only where it is of the kind that they look for."""

import pytest
import torch
from torch import nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.declared import declared
from models.feedforward import SwiGLU
from models.positions.rope import Rope
from trainer.optim.adamw import decayed_parameters, lr_scales

NAMES = (
    "positions_per_step",
    "products",
    "active_share",
    "undecayed",
    "decayed",
    "rates",
    "shares_values",
    "blocks",
)


class Taken(Attention):
    """A user's layer in which all of these names mean something of its own."""

    def __init__(self, kind):
        super().__init__(16, 4, 4, Rope())
        for name in NAMES:
            setattr(self, name, (lambda: 5) if kind == "method" else nn.Parameter(torch.ones(2, 2)))


def decoder(*mixers):
    return Decoder(11, 16, mixers, [SwiGLU(16, 8) for _ in mixers])


@pytest.mark.parametrize("kind", ["method", "parameter"])
def test_a_name_that_means_something_else_in_a_layer_says_nothing(kind):
    plain, taken = decoder(Attention(16, 4, 4, Rope())), decoder(Taken(kind))
    assert count_flops(taken) == count_flops(plain)
    assert decayed_parameters(taken) == decayed_parameters(plain) and lr_scales(taken) == {}
    own = sum(p.numel() for p in taken.parameters()) - sum(p.numel() for p in plain.parameters())
    assert count_parameters(taken).active == count_parameters(plain).active + own


def test_a_kind_that_fits_is_taken():
    layer = nn.Identity()
    layer.products = 7
    assert declared(layer, "products", int, 0) == 7 and declared(layer, "absent", int, 3) == 3
