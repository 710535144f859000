"""Recurrent layers over rows that go on: what they carry is all that the rows before can tell."""

import pytest
import torch
from torch import nn

from models.carried_state import SHARDED, CarriedState
from models.memory.base import Memory
from models.memory.segments import SegmentMemory
from models.recurrent.rwkv_layers import ChannelMix, TokenShift
from models.span import Span
from tests.models.memory.test_segments import (
    CUTS,
    LENGTHS,
    TOKENS,
    Attached,
    apart,
    content,
    gradients,
    pieces,
)
from tests.support.knn_rows import build, lanes
from tests.variants import WIDTH

CARRYING = [
    "linear",
    "performer",
    "retention",
    "gated_linear",
    "rwkv6",
    "rwkv7",
    "delta",
    "gated_delta",
    "mamba2",
    "short_conv",
    "channel_mix",
    "gated_channel_mix",
    "hyena",
]


def carrying(name: str) -> nn.Module:
    """Two layers whose filters, if they have any, are longer than a row."""
    return build(name, Memory() if name == "hyena" else SegmentMemory(0))


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", CARRYING)
def test_rows_with_their_past_give_what_the_whole_gives_wherever_they_are_cut(name, cuts):
    model, x = carrying(name), content()
    want = model(x, lanes(LENGTHS, 0, TOKENS))
    assert apart(pieces(model, x, LENGTHS, CUTS[cuts], CarriedState()), want) < 1e-11


def test_a_document_that_does_not_go_on_hears_nothing_of_what_was_left():
    for name in ("rwkv7", "mamba2", "short_conv"):
        model, x, past = carrying(name), content(), CarriedState()
        model(x[:, :20], past.attach(Span.line(2, 20)))
        past.advance()
        first = Span.line(2, 25)
        assert (
            apart(model(x[:, 20:], past.attach(first)), model(x[:, 20:], Span.line(2, 25))) < 1e-13
        )


def test_a_document_longer_than_a_long_filter_is_refused():
    model, x, past, lengths = carrying("hyena"), content(1, 55), CarriedState(), [[55]]
    assert (
        apart(
            pieces(model, x[:, :51], lengths, [30], CarriedState()),
            model(x[:, :51], lanes(lengths, 0, 51)),
        )
        < 1e-11
    )
    with pytest.raises(ValueError, match=r"the filter has 51 taps.*longest document"):
        pieces(model, x, lengths, [30], past)


class Remembering(Attached):
    """Keeps the gradient of states too."""

    def leave(self, name, state, kind="whole"):
        self._left[name] = kind, state


@pytest.mark.parametrize("name", ["short_conv", "channel_mix", "hyena"])
def test_without_the_stop_all_gradients_are_those_of_the_whole(name):
    x, model = content().requires_grad_(), carrying(name)
    want = gradients(model, x, model(x, lanes(LENGTHS, 0, TOKENS)))
    got = gradients(model, x, pieces(model, x, LENGTHS, CUTS["anywhere"], Remembering()))
    assert max(apart(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


@pytest.mark.parametrize("name", ["retention", "rwkv6", "gated_delta"])
def test_a_state_is_carried_without_its_gradient(name):
    """Gradients of a row are those of the row read from a constant state."""
    model, x, past = carrying(name), content().requires_grad_(), CarriedState()
    model(x[:, :20], past.attach(lanes(LENGTHS, 0, 20)))
    past.advance()
    assert all(kind == SHARDED and not state.requires_grad for kind, state in past.states.values())
    (grad,) = torch.autograd.grad(
        model(x[:, 20:], past.attach(lanes(LENGTHS, 20, TOKENS))).square().sum(), x
    )
    assert (grad[:, :20] == 0).all() and (grad[:, 20:] != 0).any(-1).all()


def test_a_state_has_one_size_whatever_was_read():
    sizes = set()
    for tokens in (10, 30):
        past, model = CarriedState(), carrying("rwkv7")
        model(content(2, tokens), past.attach(Span.line(2, tokens)))
        past.advance()
        sizes.add(past.bytes())
    assert len(sizes) == 1 and sizes.pop() > 0


def test_feedforwards_that_look_back_one_token_carry_it():
    shift, x, past = TokenShift(), content(1, 6), CarriedState()
    shift.mix.place = "a"
    got = pieces(shift, x, [[6]], [3], past)
    assert torch.equal(got[0, 3], x[0, 2] - x[0, 3])
    assert ChannelMix(WIDTH, 8, 0, 1).shift.mix.place == ""
