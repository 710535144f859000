"""Spreading swaps leaves and nothing else, and says at once what it cannot do."""

import pytest
from torch import nn

from models.architectures.decoder import Decoder
from models.attention.full import CAUSAL, Attention
from models.memory.tokens import MemoryTokens
from models.moe.switch import Switch
from models.positions.rope import Rope
from models.primitives.softmax import Softmax
from models.scores import Score
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel, refusals, unreachable
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_usp import Usp
from tests.support.parity import grid
from tests.support.pool import ranks


class Headless(Score):
    """Queries without heads."""

    query_heads = (None,)
    payload_heads = (None, None)


def swapped(env, method, score, **rest):
    if rest.pop("gridded", False):
        rest["grid"] = grid(env, 2)
    model = nn.ModuleDict(
        {"outer": nn.ModuleDict({"mix": Softmax(CAUSAL, score), "other": nn.Linear(2, 2)})}
    )
    names = list(model.state_dict())
    try:
        communicator = apply_context_parallel(model, env.group, method, **rest)
    except ValueError as error:
        return str(error)
    assert list(model.state_dict()) == names and isinstance(model["outer"]["other"], nn.Linear)
    return type(model["outer"]["mix"]).__name__, communicator.heads


def test_a_leaf_becomes_its_driver():
    assert ranks(4, swapped, "ring", None) == [(Ring.__name__, None)] * 4


def test_usp_takes_the_grid_of_the_mesh_or_makes_its_own():
    def asked(**rest):
        return ranks(4, swapped_usp, rest)

    assert asked(gridded=True) == [(Usp.__name__, 2)] * 4
    assert asked(heads=2) == [(Usp.__name__, 2)] * 4


def swapped_usp(env, rest):
    return swapped(env, "usp", None, **rest)


def test_what_cannot_be_is_said_at_once():
    assert (
        "choose one of auto, ring, ulysses, allgather, usp"
        in ranks(4, swapped, "telepathy", None)[0]
    )
    assert "needs parallel.ulysses and parallel.ring" in ranks(4, swapped, "usp", None)[0]
    said = ranks(4, swapped, "ulysses", Headless())[0]
    assert (
        said
        == "parallel.method=ulysses trades heads, but the queries of outer.mix have none; use ring"
        " or allgather"
    )


@pytest.mark.parametrize(
    "method, count", [("ring", 0), ("allgather", 0), ("auto", 0), ("ulysses", 1), ("usp", 1)]
)
def test_the_check_can_ask_before_any_rank_starts(method, count):
    model = nn.ModuleDict({"a": Softmax(CAUSAL, Headless()), "b": Softmax(CAUSAL)})
    assert len(refusals(model, method)) == count


def shared(env, sequence, experts):
    """The classes that stand for a mixture's leaves."""
    layer = Switch(4, 4, experts=4)
    names = list(layer.state_dict())
    communicator = apply_context_parallel(
        layer, env.group if sequence else None, experts=env.group if experts else None
    )
    assert list(layer.state_dict()) == names and isinstance(communicator, Communicator)
    return type(layer.dispatch).__name__, type(layer.tally).__name__


def test_experts_that_segments_pass_through_one_by_one_stay_whole():
    memory = MemoryTokens(2)
    model = Decoder(5, 4, [Attention(4, 1, 1, Rope())], [Switch(4, 4, experts=4)], memory=memory)
    (reason,) = unreachable(model)
    assert "blocks.0.feedforward has experts" in reason and "parallel.experts=1" in reason
    assert unreachable(Decoder(5, 4, [Attention(4, 1, 1, Rope())], [Switch(4, 4, experts=4)])) == []


def test_experts_are_shared_where_a_group_is_named_and_sequences_where_another_is():
    assert ranks(2, shared, True, False) == [("ExpertDispatch", "ShardedSegmentSum")] * 2
    assert ranks(2, shared, False, True) == [("ExpertAllToAll", "SegmentSum")] * 2
    assert ranks(2, shared, True, True) == [("ExpertAllToAll", "ShardedSegmentSum")] * 2
