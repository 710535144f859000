"""The two ends of a step that overlap with others: its input, met ahead, and its figures, read
behind."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh
from trainer.data.lanes import Held
from trainer.data.streams.base import Cursor
from trainer.data.streams.prefetch import Prefetcher, StepCounts, StepInput
from trainer.logs.jsonl import MetricsRow
from trainer.logs.meters import Meter, peak_memory_bytes
from trainer.step.sums import UnreadFigures
from trainer.stop_signal import Meeting, StopSignal


class InputsAhead:
    """Inputs of steps on which the ranks have met.

    Args:
        prefetcher: reads them.
        stop: lets the ranks meet.
        steps: number of the last step.
    """

    def __init__(self, prefetcher: Prefetcher, stop: StopSignal, steps: int):
        self.prefetcher = prefetcher
        self.stop = stop
        self.steps = steps
        self._begun: tuple[StepInput, Meeting] | None = None

    def look_ahead(self, cursor: Cursor, step: int) -> None:
        """Begins the meeting before a step, while a device still computes the one before it."""
        if not self.prefetcher.is_ahead or step > self.steps:
            return
        try:
            given = self.prefetcher.read(cursor)
        except Exception:
            return  # raised again where the step begins: the one before it is to be whole
        self._begin(given, step)

    def meet(self, cursor: Cursor, step: int) -> StepInput | None:
        """Returns the input with the figures of all data ranks; None where a signal came in."""
        if self._begun is None:
            self._begin(self.prefetcher.read(cursor), step)
        return self._met()

    def meet_unread(self, cursor: Cursor, step: int) -> StepInput | None:
        """As `meet`, but nothing is read ahead, and the step is read once more."""
        self._begin(self.prefetcher.load(cursor), step)
        return self._met()

    def _begin(self, given: StepInput, step: int) -> None:
        self._begun = given, self.stop.begin(given.marks, given.figures, f"step {step}")

    def _met(self) -> StepInput | None:
        assert self._begun is not None
        given, meeting = self._begun
        self._begun = None
        sums = meeting.answer()
        if sums is None:
            return None
        valid_tokens, rows, flops = sums
        return given._replace(figures=StepCounts(int(valid_tokens), int(rows), flops))


class LaunchedStep(NamedTuple):
    """A step whose figures are not read yet.

    Attributes:
        number: of the step.
        cursor: place of its batch in the data.
        counts: of its rows, over all ranks.
        learning_rate: of the step.
        unread: its figures.
        flags: [rows] bool of each micro-batch; rows whose loss is not finite.
        carried_before: what rows left behind before it.
    """

    number: int
    cursor: Cursor
    counts: StepCounts
    learning_rate: float
    unread: UnreadFigures
    flags: list[Tensor]
    carried_before: list[Held] | None

    def row(
        self, mesh: Mesh, meter: Meter, *, tokens: int, loss: float | None, norm: float
    ) -> MetricsRow:
        """Returns the row of metrics.jsonl; its peak memory is that of the fullest rank.
        Collective.

        Args:
            mesh: the ranks.
            meter: tells how fast steps were taken.
            tokens: that the run has learned from.
            loss: of the step; None where there was nothing to predict.
            norm: of its gradient.
        """
        # from host to host, so that no device is waited for
        memory = torch.tensor(float(peak_memory_bytes(mesh.device)), dtype=torch.float64)
        if mesh.world.group is not None:
            dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=mesh.world.group)
        reading = meter.read(self.unread.known_at)
        return MetricsRow(
            step=self.number,
            loss=loss,
            tokens=tokens,
            tokens_per_second=reading.tokens_per_second,
            step_seconds=reading.step_seconds,
            grad_norm=norm,
            learning_rate=self.learning_rate,
            peak_memory_bytes=int(memory.item()),
            mfu=reading.mfu,
        )
