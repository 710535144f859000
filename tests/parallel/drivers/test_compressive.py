"""Infini-attention over ranks: rows of lanes, one after another, equal one device in outputs and
all gradients."""

from functools import partial

import pytest
import torch
from torch import nn

from models.attention.full import Attention
from models.memory.compressive import Compressive
from models.positions.rope import Rope
from parallel.layout import POLICIES
from tests.support.lanes import WIDTH, compare, poisoned
from tests.support.pool import ranks

METHODS = {2: "ulysses", 3: "ring", 4: "usp"}


def mixer(rule: str, segment: int | None) -> nn.Module:
    return Compressive(rule=rule, segment=segment).around(Attention(WIDTH, 4, 2, Rope()))


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("segment", [None, 4])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_rows_of_lanes_are_those_of_one_device(rule, segment, policy, size):
    build = partial(mixer, rule, segment)
    for worst in ranks(size, compare, build, METHODS[size], policy, torch.float64):
        assert max(worst.values()) < 1e-11, worst


@pytest.mark.parametrize("segment", [None, 4])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_single_precision_keeps_the_memory_exact_to_its_rounding(rule, segment):
    for worst in ranks(
        3, compare, partial(mixer, rule, segment), "allgather", "zigzag", torch.float32
    ):
        assert max(worst.values()) < 2e-5, worst


@pytest.mark.parametrize("segment", [None, 4])
@pytest.mark.parametrize("rule", ["linear", "delta"])
def test_a_document_that_is_not_a_number_stays_by_itself(rule, segment):
    assert max(ranks(3, poisoned, partial(mixer, rule, segment), "zigzag")) < 1e-11
