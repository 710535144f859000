"""Decides whether compiled blocks serve a run: they do unless they are slower."""

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from parallel.compilation import CompiledForward, graph_breaks
from parallel.mesh import Mesh

SLOWER = 1.02  # compiled blocks that take more than this many times as long are given up
ROUNDS = 3


def choose_compilation(
    blocks: Sequence[CompiledForward],
    work: Callable[[], object],
    mesh: Mesh,
    say: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Measures both forms of the blocks, sets the faster one on every rank, and returns it.

    Each form is warmed up and then timed in ROUNDS alternating rounds, of which the fastest counts:
    eight pieces of work in all. The slowest rank decides, because the others wait for it.

    Args:
        blocks: of the model.
        work: the forward and backward passes of one step, without a lasting effect. Collective.
        mesh: the ranks.
        say: receives the decision.
        clock: seconds.
    """
    # Row 0 is of the eager form, row 1 of the compiled one.
    best = torch.full((2,), torch.inf, dtype=torch.float64)
    for number in range(1 + ROUNDS):
        for form in (0, 1):
            for block in blocks:
                block.enabled = bool(form)
            seconds = _timed(work, mesh.device, clock)
            # The first round compiles, and fills caches.
            if number:
                best[form] = min(best[form].item(), seconds)
    slowest = best.to(mesh.device)
    if mesh.world.group is not None:
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=mesh.world.group)
    eager_s, compiled_s = slowest.tolist()
    enabled = compiled_s <= SLOWER * eager_s
    for block in blocks:
        block.enabled = enabled
    decision = "compiled blocks serve" if enabled else "they are given up for this run"
    say(
        f"engine.compile: {compiled_s:.4g} s for the passes of a step compiled, {eager_s:.4g} s as"
        f" written; {graph_breaks().line()}; {decision}"
    )
    return enabled


def _timed(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Returns the seconds that the work takes, on an accelerator to its end."""
    began = clock()
    work()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return clock() - began
