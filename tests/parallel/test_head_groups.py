"""Attention in groups of heads: the same numbers, and less in memory at once."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.lora import LoraLinear, add_adapters
from models.micro_batch import MicroBatch
from models.positions.rope import Rope
from models.span import Span
from parallel.engines.base import blocks_of
from parallel.head_groups import apply_head_groups, groupable_layers, unequal_groups
from parallel.parallelize import compute_again
from tests.support.live import Live
from tests.support.parity import build, compare_cut, given, packed, relative, truth
from tests.support.pool import ranks
from tests.variants import VARIANTS, WIDTH

EXACT = 1e-12


def groupable() -> dict[str, list[int]]:
    """Numbers of groups into which the heads of each mixer can be cut."""
    names = {}
    for name, make in VARIANTS.items():
        layers = list(groupable_layers(make()))
        if layers:
            names[name] = [n for n in (2, 3, 6) if unequal_groups(layers[0], n) is None]
    return names


NAMES = groupable()


def compare(mixer: nn.Module, got: Tensor, part: Tensor, wanted: tuple[Tensor, Tensor]) -> float:
    """The worst relative difference of the output and of the input's gradient at real tokens."""
    valid = packed().valid()[..., None]
    assert part.grad is not None
    return max(relative(got * valid, wanted[0] * valid), relative(part.grad, wanted[1]))


def test_most_attention_layers_can_be_grouped():
    assert {"full", "multi_query", "qk_norm", "gated", "sink_logit", "softcap"} <= set(NAMES)
    assert all(len(numbers) >= 2 for numbers in NAMES.values())


@pytest.mark.parametrize("name", NAMES)
def test_groups_give_the_layer(name):
    for groups in NAMES[name]:
        check_groups(name, groups)


def check_groups(name: str, groups: int) -> None:
    (x, weight), (want, d_x, d_parameters) = given(torch.float64), truth(name, torch.float64)
    mixer = build(name)
    assert apply_head_groups(mixer, groups) == 1
    whole = x.clone().requires_grad_()
    got = mixer(whole, packed())
    (got * weight).sum().backward()
    assert compare(mixer, got, whole, (want, d_x)) <= EXACT
    for key, parameter in mixer.named_parameters():
        assert (parameter.grad is None) == (key not in d_parameters)
        if parameter.grad is not None:
            assert relative(parameter.grad, d_parameters[key]) <= EXACT, key
    with torch.no_grad():
        assert relative(mixer(x, packed()), got) <= EXACT


def over_ranks(env: Any, name: str, method: str) -> float:
    """The worst relative difference of this rank's part."""

    def group(mixer: nn.Module) -> None:
        assert apply_head_groups(mixer, NAMES[name][0]) == 1

    return max(compare_cut(env, name, method, "zigzag", change=group).values())


@pytest.mark.parametrize(
    "name, method, size",
    [("full", "ring", 3), ("alibi", "allgather", 3), ("qk_norm", "ulysses", 2), ("t5", "usp", 4)],
)
def test_groups_over_ranks_give_the_layer(name, method, size):
    assert max(ranks(size, over_ranks, name, method)) <= 1e-11


def decoder(kv_heads: int = 2) -> Decoder:
    mixers = [Attention(WIDTH, 4, kv_heads, Rope(), bias=True, out_bias=True) for _ in range(2)]
    return Decoder(29, WIDTH, mixers, [SwiGLU(WIDTH, 2 * WIDTH) for _ in mixers])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_checkpointed_model_with_adapters_and_biases(groups):
    row = torch.arange(40)[None] % 29
    batch = MicroBatch(row, Span.line(1, 40), row)
    gradients = []
    for grouped in (False, True):
        model = decoder()
        add_adapters(model, rank=3, alpha=6.0, targets=["*.q", "*.v", "*.out"])
        model = initialise(model, seed=4).double()
        for module in model.modules():
            if isinstance(module, LoraLinear):
                nn.init.normal_(module.lora_B, generator=torch.Generator().manual_seed(5))
        model.requires_grad_(True)
        if grouped:
            assert apply_head_groups(model, groups) == 2
            for block in blocks_of(model):
                block.forward = compute_again(block.forward)
        model(batch).sum().backward()
        gradients.append({key: parameter.grad for key, parameter in model.named_parameters()})
    for key, wanted in gradients[0].items():
        assert wanted is not None
        got = gradients[1][key]
        assert got is not None
        assert relative(got, wanted) <= EXACT, key


def test_heads_that_make_no_equal_groups_are_named():
    layer = next(groupable_layers(decoder()))
    assert unequal_groups(layer, 2) is None
    assert unequal_groups(layer, 4) is None  # a key head serves two groups
    assert unequal_groups(layer, 3) == "4 heads do not divide into 3 groups"
    six = next(groupable_layers(Attention(36, 6, 3, Rope())))
    assert unequal_groups(six, 2) == "3 key heads neither divide into 2 groups nor divide 2"
    assert apply_head_groups(six, 2) == 0


def test_names_of_parameters_stay():
    model = decoder()
    before = list(model.state_dict())
    apply_head_groups(model, 2)
    assert list(model.state_dict()) == before
    assert len(list(model.modules())) == len(list(decoder().modules()))


def peak_of_attention(groups: int | None) -> tuple[int, int]:
    """(most bytes alive in forward and backward of a layer, bytes of its tokens)."""
    tokens, width, heads = 512, 64, 16
    layer = Attention(width, heads, heads, Rope(), head_width=64)
    if groups is not None:
        apply_head_groups(layer, groups)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    hidden = torch.zeros(1, tokens, width, requires_grad=True)
    span = Span.line(1, tokens)
    with Live() as live:
        layer(hidden, span).sum().backward()
    return live.peak, tokens * width * hidden.element_size()


def test_the_peak_falls_with_the_groups():
    whole, stream = peak_of_attention(None)
    fourth, _ = peak_of_attention(4)
    sixteenth, _ = peak_of_attention(16)
    # Beside a group: the output, the share of a group, and the gradients of both and of the tokens.
    assert fourth - 6 * stream < 0.3 * whole
    assert sixteenth - 6 * stream < 0.1 * whole
