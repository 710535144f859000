"""No table may forget a primitive: without a driver, or without a FLOP count, it is refused."""

import importlib
import pkgutil

import pytest
from torch import nn

import models.primitives
from models.architectures.decoder import Decoder
from models.cost.flops import WATCHES, CostTrace, trace_cost
from models.primitive import Primitive
from parallel.context_parallel import DRIVERS, apply_context_parallel, refusals
from tests.support.pool import ranks


class RowMedian(Primitive):
    """A primitive that reads other tokens and that neither table knows."""

    def forward(self, hidden, span):
        return hidden - hidden.median(1, keepdim=True).values


class MedianMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.median = RowMedian()

    def forward(self, hidden, span):
        return self.median(hidden, span)


def median_model():
    return Decoder(5, 4, [MedianMixer()], [nn.Linear(4, 4)])


def spread(env):
    try:
        apply_context_parallel(median_model(), env.group)
    except ValueError as error:
        return str(error)
    return "accepted"


def primitive_kinds():
    """Every module class that a file of models/primitives defines."""
    kinds = []
    for file in pkgutil.iter_modules(models.primitives.__path__):
        source = importlib.import_module(f"models.primitives.{file.name}")
        for value in vars(source).values():
            defined = isinstance(value, type) and value.__module__ == source.__name__
            if defined and issubclass(value, nn.Module):
                kinds.append(value)
    return kinds


@pytest.mark.parametrize("method", ["auto", "ring", "ulysses", "allgather", "usp"])
def test_a_primitive_without_a_driver_is_refused_before_any_rank_starts(method):
    (refusal,) = refusals(median_model(), method)
    assert "no driver for RowMedian (blocks.0.mixer.median)" in refusal


def test_a_primitive_without_a_driver_is_not_left_in_place():
    assert all("no driver for RowMedian" in answer for answer in ranks(2, spread))


def test_a_primitive_without_a_flop_count_is_refused():
    with pytest.raises(TypeError, match="no FLOP count for RowMedian"):
        trace_cost(median_model(), CostTrace())


def test_every_module_of_the_folder_is_a_primitive_that_the_tables_know():
    kinds = primitive_kinds()
    assert len(kinds) >= 10
    for kind in kinds:
        assert issubclass(kind, Primitive), kind
        assert kind in DRIVERS or not kind.needs_driver, kind
        assert kind in WATCHES or not kind.counts_flops, kind
