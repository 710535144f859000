"""The peak memory and traffic of real steps on the CPU, as the allocator and the drivers saw them.

What a plan is held against. The allocator's own events are read, by which also buffers inside
operations and storages that are shrunk by hand are seen; nothing of a plan's counting is used.

The profiler sees what is freed by the threads that it was started for, and not what gloo's threads
free. Such a thread says that an exchange is done and lets go of its tensors afterwards: whoever
holds them last frees them. A rank therefore gives it a moment after every exchange. Where that was
too short, a copy would count as held ever after, so that the least of the peaks of several steps is
taken.
"""

import gc
import time
from bisect import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

from parallel.activation_offload import ActivationOffload
from parallel.engines.optimizer_offload import OptimizerOffload
from parallel.mesh import Mesh
from trainer.config.schema import Config
from trainer.planning.rehearsal import Rehearsal

MEMORY = "[memory]"  # the profiler's name of an allocation or its end


STEPS = 3  # that are measured
MOMENT_S = 0.002  # for a thread of gloo to let go


class MeasuredStep(NamedTuple):
    """Steps of a run on this rank, after its first.

    Attributes:
        peaks: most bytes of tensors that were alive at once, of each step.
        sent_bytes: that the drivers sent in a step, by kind of move.
    """

    peaks: list[int]
    sent_bytes: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """The least of the peaks: what a step needs."""
        return min(self.peaks)


def measure_step(
    config: Config,
    mesh: Mesh,
    model: nn.Module,
    offload: ActivationOffload | None = None,
    optimizer_offload: OptimizerOffload | None = None,
) -> MeasuredStep:
    """Takes a step of a run and measures those after it. Collective.

    Args:
        config: of the run.
        mesh: the ranks; on the CPU.
        model: as built, on the meta device.
        offload: takes activations to the host in place of the run's own way.
        optimizer_offload: the same of the optimiser's state.
    """
    gc.collect()
    beginnings = []
    profiling = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiling as profiler, _let_go():
        rehearsal = Rehearsal(config, mesh, model, offload, optimizer_offload)
        rehearsal.step()
        communicator = rehearsal.placement.communicator
        for _ in range(STEPS):
            if communicator is not None:
                communicator.bytes_sent.clear()
            gc.collect()
            beginnings.append(time.time_ns())
            rehearsal.step()
    result = profiler.profiler
    assert result is not None and result.kineto_results is not None
    events = []
    # The stubs of torch lack what an event has.
    found: list[Any] = result.kineto_results.events()
    for event in found:
        if event.name() == MEMORY:
            events.append((event.start_ns(), event.nbytes()))
    alive = 0
    peaks = [0] * STEPS
    for moment_ns, change in sorted(events, key=lambda event: event[0]):
        step = bisect(beginnings, moment_ns) - 1
        if step >= 0:
            # What was alive when it began counts, though nothing may be added to it.
            peaks[step] = max(peaks[step], alive)
        alive += change
        if step >= 0:
            peaks[step] = max(peaks[step], alive)
    sent = {} if communicator is None else dict(communicator.bytes_sent)
    return MeasuredStep(peaks, sent)


@contextmanager
def _let_go() -> Iterator[None]:
    """Has every wait for an exchange last a moment longer than the exchange."""
    wait = dist.Work.wait

    def wait_longer(work: dist.Work, *args: Any, **kwargs: Any) -> Any:
        done = wait(work, *args, **kwargs)
        time.sleep(MOMENT_S)
        return done

    setattr(dist.Work, "wait", wait_longer)  # noqa: B010
    try:
        yield
    finally:
        setattr(dist.Work, "wait", wait)  # noqa: B010
