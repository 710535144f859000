"""The peak memory and traffic of a real step on the CPU, as the allocator and the drivers saw them.

What a plan is held against. The allocator's own events are read, by which also buffers inside
operations and storages that are shrunk by hand are seen; nothing of a plan's counting is used.
"""

import gc
import time
from typing import Any, NamedTuple

from torch import nn
from torch.profiler import ProfilerActivity, profile

from parallel.mesh import Mesh
from trainer.config.schema import Config
from trainer.planning.rehearsal import Rehearsal

MEMORY = "[memory]"  # the profiler's name of an allocation or its end


class MeasuredStep(NamedTuple):
    """The second step of a run on this rank.

    Attributes:
        peak_bytes: most bytes of tensors that were alive at once.
        sent_bytes: that the drivers sent, by kind of move.
        seconds: that it took, with the profiler on.
    """

    peak_bytes: int
    sent_bytes: dict[str, int]
    seconds: float


def measure_step(config: Config, mesh: Mesh, model: nn.Module) -> MeasuredStep:
    """Takes two steps of a run and measures the second. Collective.

    Args:
        config: of the run.
        mesh: the ranks; on the CPU.
        model: as built, on the meta device.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        rehearsal = Rehearsal(config, mesh, model)
        rehearsal.step()
        communicator = rehearsal.placement.communicator
        if communicator is not None:
            communicator.bytes_sent.clear()
        gc.collect()
        began_ns = time.time_ns()
        began = time.perf_counter()
        rehearsal.step()
        seconds = time.perf_counter() - began
    result = profiler.profiler
    assert result is not None and result.kineto_results is not None
    events = []
    # The stubs of torch lack what an event has.
    found: list[Any] = result.kineto_results.events()
    for event in found:
        if event.name() == MEMORY:
            events.append((event.start_ns(), event.nbytes()))
    alive = 0
    peak = 0
    for moment_ns, change in sorted(events, key=lambda event: event[0]):
        alive += change
        if moment_ns >= began_ns:
            peak = max(peak, alive)
    sent = {} if communicator is None else dict(communicator.bytes_sent)
    return MeasuredStep(peak, sent, seconds)
