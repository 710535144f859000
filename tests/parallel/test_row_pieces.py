"""A row in pieces over ranks against the same row at once: outputs and every gradient."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.carried_state import name_stateful_modules
from models.causality import layers_ahead
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.row_pieces import ShardedPieceState
from parallel.rows_in_time import run_in_pieces
from parallel.sharding import shard_span
from tests.support.parity import GRID_HEADS, build, given, grid, methods_of, packed, relative, truth
from tests.support.pool import ranks
from tests.support.row_pieces import compare_model, pieces_of
from tests.variants import VARIANTS

SIZES = (2, 3)
CUTS = {2: [20, 31], 3: [14, 2, 35], 5: [13, 11, 7, 8, 12]}
POLICIES = ("zigzag", "contiguous", "balanced")
CAUSAL = [name for name in VARIANTS if not layers_ahead(VARIANTS[name]())]


def compare(env: Any, name: str, method: str, policy: str, sizes: list[int]) -> dict[str, float]:
    """Worst relative difference of the output, the input's gradient and every parameter's."""
    x, weight = given(torch.float64)
    want, d_x, d_parameters = truth(name, torch.float64)
    model = build(name)
    name_stateful_modules(model)
    side = GRID_HEADS[env.size] if method == "usp" else 1
    apply_context_parallel(
        model, env.group, method, grid=grid(env, side) if method == "usp" else None
    )
    spans = []
    for part in pieces_of(packed(), sizes):
        spans.append(shard_span(part, layouts(policy, part, env.size, heads=side), env.rank))

    def shard(whole: Tensor) -> list[Tensor]:
        parts = whole.split(sizes, 1)
        return [span.sharding.shard(x, 0) for span, x in zip(spans, parts, strict=True)]

    inputs = [part.clone().requires_grad_() for part in shard(x)]
    weights = shard(weight)
    outputs: dict[int, Tensor] = {}

    def learn(number: int, span: Span) -> Tensor:
        outputs[number] = model(inputs[number], span)
        return (outputs[number] * weights[number]).sum()

    run_in_pieces(
        ShardedPieceState(spans),
        lambda number, span: model(inputs[number], span),
        learn,
        lambda loss, last: loss.backward(),
    )
    worst = {}
    for number, (wanted, gradient) in enumerate(zip(shard(want), shard(d_x), strict=True)):
        valid = spans[number].valid()[..., None]
        found = inputs[number].grad
        found = torch.zeros_like(inputs[number]) if found is None else found
        # A piece may hold a few small numbers alone: differences are relative to the whole row.
        worst[f"output {number}"] = _share((outputs[number] - wanted) * valid, want)
        worst[f"input {number}"] = _share((found - gradient) * valid, d_x)
    for key, parameter in model.named_parameters():
        assert (parameter.grad is None) == (key not in d_parameters), key
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=env.group)
            worst[key] = relative(parameter.grad, d_parameters[key])
    return worst


def _share(difference: Tensor, whole: Tensor) -> float:
    return float(difference.abs().max() / whole.abs().max()) if difference.numel() else 0.0


def cases() -> list[Any]:
    """Every mixer once with each number of ranks; methods, layouts and cuts take turns.

    `make test` runs every mixer with one number of ranks, and every other with the other.
    """
    found = []
    for row, name in enumerate(CAUSAL):
        methods = methods_of()[name]
        for turn, size in enumerate(SIZES):
            method = methods[(row + turn) % len(methods)]
            policy = POLICIES[(row // 2 + turn) % len(POLICIES)]
            count = list(CUTS)[(row + turn) % len(CUTS)]
            marks = () if turn == row % len(SIZES) else pytest.mark.full
            found.append(pytest.param(name, method, policy, size, count, marks=marks))
    return found


@pytest.mark.parametrize(("name", "method", "policy", "size", "count"), cases())
def test_every_causal_mixer(name: str, method: str, policy: str, size: int, count: int):
    for worst in ranks(size, compare, name, method, policy, CUTS[count]):
        assert max(worst.values()) < 1e-11, worst


LANE_CUTS = {2: [5, 12], 3: [6, 2, 9]}
# Each with a method and a layout; memories of all kinds, experts, recurrent models.
WHOLE = [
    ("hybrid", "ring", "zigzag"),
    ("hybrid_convolutions", "allgather", "balanced"),
    ("shared_values", "ring", "contiguous"),
    ("experts_topk", "ulysses", "zigzag"),
    ("experts_switch", "ring", "balanced"),
    ("memory_segments", "ring", "zigzag"),
    ("memory_segments_hybrid", "allgather", "contiguous"),
    ("memory_segments_row", "ulysses", "balanced"),
    ("memory_compressive", "ring", "zigzag"),
    ("memory_compressive_delta", "allgather", "contiguous"),
    ("memory_compressive_row", "auto", "zigzag"),
    ("memory_lookup", "ring", "balanced"),
    ("lstm", "ring", "zigzag"),
    ("ntm", "ring", "contiguous"),
    ("key_value", "ring", "zigzag"),
]


# Of their kinds in `make test`: the others have another rule, method or layout.
ONE_OF_A_KIND = ("hybrid", "shared_values", "experts_switch", "memory_segments")
ONE_OF_A_KIND += ("memory_compressive", "memory_lookup", "lstm", "ntm", "key_value")


def whole_cases() -> list[Any]:
    """Every model with both numbers of ranks, which take turns in `make test`."""
    found = []
    for row, case in enumerate(WHOLE):
        for turn, size in enumerate(LANE_CUTS):
            short = turn == row % 2 and case[0] in ONE_OF_A_KIND
            marks = () if short else pytest.mark.full
            found.append(pytest.param(*case, size, marks=marks))
    return found


@pytest.mark.parametrize(("name", "method", "policy", "size"), whole_cases())
def test_whole_models_with_memories_and_experts(name: str, method: str, policy: str, size: int):
    for worst in ranks(size, compare_model, name, method, policy, LANE_CUTS[size]):
        assert max(worst.values()) < 1e-11, worst
