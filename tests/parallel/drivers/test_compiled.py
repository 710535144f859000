"""Compiled mixers over ranks: the same numbers, and graphs that end at exchanges only."""

from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from parallel.compilation import GraphBreaks, compile_block, graph_breaks
from parallel.context_parallel import OPAQUE
from tests.parallel.drivers.test_half_precision import RANKS, one_of_each
from tests.support.families import family
from tests.support.parity import Case, compare_cut
from tests.support.pool import ranks

# The compiler's front, which decides where graphs end, without minutes of a C++ compiler.
FRONT = partial(torch.compile, backend="aot_eager")


def compiled(env: Any, case: Case) -> tuple[float, GraphBreaks, int]:
    """(worst relative difference, where graphs ended, modules that are left out), of a rank."""
    opaque: list[nn.Module] = []

    def compile_it(mixer: nn.Module) -> None:
        opaque.extend(module for module in mixer.modules() if isinstance(module, OPAQUE))
        with mock.patch.object(torch, "compile", FRONT):
            compile_block(mixer)

    torch.compiler.reset()
    before = graph_breaks()
    worst = max(compare_cut(env, *case[:3], change=compile_it).values())
    after = graph_breaks()
    others = {reason: n for reason, n in after.others.items() if n > before.others.get(reason, 0)}
    found = GraphBreaks(after.graphs - before.graphs, after.left_out - before.left_out, others)
    return worst, found, len(opaque)


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
