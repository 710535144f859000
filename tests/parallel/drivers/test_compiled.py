"""Compiled mixers over ranks: the same numbers, and graphs that end at exchanges only."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from parallel.compilation import GraphBreaks, compile_block, graph_breaks
from parallel.context_parallel import OPAQUE, apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.parallel.drivers.test_half_precision import RANKS, one_of_each
from tests.support.families import family
from tests.support.parity import GRID_HEADS, Case, build, given, grid, packed, relative, truth
from tests.support.pool import ranks

# The compiler's front, which decides where graphs end, without minutes of a C++ compiler.
FRONT = partial(torch.compile, backend="aot_eager")


def compiled(env: Any, case: Case) -> tuple[float, GraphBreaks, int]:
    """(worst relative difference, where graphs ended, modules that are left out), of a rank."""
    (x, weight), (want, d_x, d_parameters) = given(torch.float64), truth(case.name, torch.float64)
    mixer, span = build(case.name), packed()
    side = GRID_HEADS[RANKS] if case.method == "usp" else 1
    apply_context_parallel(
        mixer, env.group, case.method, grid=grid(env, side) if case.method == "usp" else None
    )
    torch.compiler.reset()
    before = graph_breaks()
    with mock.patch.object(torch, "compile", FRONT):
        compile_block(mixer)
    here = shard_span(span, layouts(case.policy, span, RANKS, heads=side), env.rank)
    shard, valid = here.sharding.shard, here.valid()[..., None]
    part = shard(x, 0).requires_grad_()
    got = mixer(part, here)
    (got * shard(weight, 0)).sum().backward()
    assert part.grad is not None
    worst = [relative(got * valid, shard(want, 0) * valid)]
    worst.append(relative(part.grad * valid, shard(d_x, 0) * valid))
    for key, parameter in mixer.named_parameters():
        if key in d_parameters:
            assert parameter.grad is not None
            gradient = parameter.grad.clone()
            torch.distributed.all_reduce(gradient, group=env.group)
            worst.append(relative(gradient, d_parameters[key]))
    after = graph_breaks()
    others = {reason: n for reason, n in after.others.items() if n > before.others.get(reason, 0)}
    found = GraphBreaks(after.graphs - before.graphs, after.left_out - before.left_out, others)
    return max(worst), found, sum(isinstance(module, OPAQUE) for module in mixer.modules())


def one_of_a_family() -> list[Any]:
    """A case of each mixer; all but the first of a family are `full`."""
    met = set()
    cases = []
    for case in one_of_each():
        kin = family(f"mixer={case.name}")
        cases.append(
            pytest.param(case, marks=[pytest.mark.full] if kin in met else [], id=str(case))
        )
        met.add(kin)
    return cases


@pytest.mark.parametrize("case", one_of_a_family())
def test_graphs_end_at_exchanges_only(case):
    for worst, breaks, left_out in ranks(RANKS, compiled, case):
        assert worst <= 1e-11
        assert breaks.others == {}
        assert breaks.graphs > 0
        assert (breaks.left_out > 0) == (left_out > 0)


class Printing(nn.Linear):
    """A layer that the compiler cannot take whole."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, 4] -> [1, 4]."""
        y = super().forward(x)
        torch._dynamo.graph_break("as the test wants")
        return y * 2


def test_a_break_elsewhere_is_named():
    torch.compiler.reset()
    before = graph_breaks()
    layer = Printing(4, 4)
    with mock.patch.object(torch, "compile", FRONT):
        compile_block(layer)
    layer(torch.ones(1, 4))
    after = graph_breaks()
    assert after.left_out == before.left_out
    (reason,) = set(after.others) - set(before.others)
    assert f"elsewhere ({reason})" in after.line()
