"""The loop: read a batch, add up the gradient of its micro-batches, step; log, evaluate, save; stop
when asked to.

Every rank walks through the same steps and takes every decision together with the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from models.auxiliary import auxiliary_loss, on_step_begin, on_step_end, reset_auxiliary, statistics
from models.span import Span
from parallel.engines.base import Engine
from parallel.mesh import Mesh
from trainer.agreement import mark
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.schema import Config
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Held, Lanes
from trainer.data.streams.base import Cursor, Stream
from trainer.logs.jsonl import MetricsRow
from trainer.logs.meters import Meter, peak_memory_bytes
from trainer.optim.lengthening import Factor, factor, go_on
from trainer.progress import Part, Progress
from trainer.skip_step import SkippedStep, SkipStepGuard
from trainer.step_sums import StepSums
from trainer.stop_signal import StopSignal


@dataclass
class Loop:
    """What a run is made of. `train` walks; the callables say what happens beside a step; `at` is
    told where a rank is.

    `due` names the parts of the evaluation of a step, and `evaluate` strikes from `progress.owed`
    those that it did.
    """

    config: Config
    mesh: Mesh
    engine: Engine
    stream: Stream
    share: BatchSharder
    checkpoints: CheckpointWriter
    schedule: Factor
    flops: Callable[[Span], float]
    meter: Meter
    stop: StopSignal
    log: Callable[[MetricsRow], None]
    evaluate: Callable[[Progress], object]
    due: Callable[[int], list[Part]] = lambda step: []
    say: Callable[[str], None] = print
    heartbeat: Callable[[str, int], None] = lambda phase, step: None
    lanes: Lanes | None = None
    saved: int = -1

    def __post_init__(self) -> None:
        self.guard = SkipStepGuard(self.mesh, self.share, self.config.optim)

    def train(self, progress: Progress) -> Progress:
        """Steps until the last, or until a signal; `progress` is where the run stands
        afterwards."""
        self._set_length(progress)
        with self.meter.pause():
            self._assess(progress)  # what the checkpoint that the run goes on from owed
        while progress.step < self.config.steps:
            self.heartbeat("reading the batch", progress.step + 1)
            batch, cursor = self.stream.read(progress.cursor)
            if self.stop.asked(mark(batch, self.stream.fingerprint), f"step {progress.step + 1}"):
                break
            self._step(progress, batch, cursor)
            last = progress.step == self.config.steps
            with self.meter.pause():
                progress.owed = self.due(progress.step)
                # saved first: an evaluation, and what it prints, must not cost the steps before it
                if _due(self.config.checkpoint.every, progress.step, last):
                    self.save(progress)
                self._assess(progress)
                self.heartbeat("looking after the checkpoint and for signals", progress.step)
                self.checkpoints.poll()
        with self.meter.pause():
            if (
                self.stop.caught
                and self.config.checkpoint.every
                and progress.step > max(self.saved, 0)
            ):
                self.save(progress)
            self.checkpoints.finish()
        return progress

    def _set_length(self, progress: Progress) -> None:
        """Note how long the run is to be, which may not be what it was to be before."""
        extend = self.config.schedule.extend
        progress.lengths, change = go_on(
            self.schedule, progress.lengths, progress.step, self.config.steps, extend
        )
        if change:
            self.say(change)

    def _assess(self, progress: Progress) -> None:
        """Do what is owed of this step's evaluation."""
        if progress.owed:
            self.heartbeat("evaluation", progress.step)
            self.evaluate(progress)

    def save(self, progress: Progress) -> None:
        """A checkpoint of where the run stands."""
        self.heartbeat("saving", progress.step)
        carried = {} if self.lanes is None else {"past": self.lanes.state()}
        self.checkpoints.save(progress.step, self.engine.state() | carried, progress.extra())
        self.saved = progress.step

    def _step(self, progress: Progress, batch: Batch, cursor: Cursor) -> None:
        """One optimiser step."""
        step = progress.step + 1
        rate = self.config.optim.learning_rate * factor(self.schedule, progress.lengths, step)
        valid = self.share.valid(batch)
        rows = int(batch.span().valid().any(1).sum())
        sums = StepSums()
        held = None if self.lanes is None else self.lanes.held()
        on_step_begin(self.engine.model, step)
        for number, (piece, last) in enumerate(self.share(batch)):
            span = piece.span if self.lanes is None else self.lanes.attach(number, piece.span)
            reset_auxiliary(self.engine.model)
            self.heartbeat(f"forward of micro-batch {number + 1}", step)
            with self.engine.forward_precision():
                losses = self.engine.model(piece.tokens, span, piece.targets)
            self.guard.look(losses)
            loss = losses.sum()
            beside = auxiliary_loss(self.engine.model, tokens=valid, rows=rows)
            sums.add(
                {
                    "loss": loss.detach().double() / max(valid, 1),
                    **beside,
                    **statistics(self.engine.model),
                }
            )
            weighed = self.config.optim.auxiliary_weight * sum(
                beside.values(), torch.zeros_like(loss)
            )
            self.heartbeat(f"backward of micro-batch {number + 1}", step)
            self.engine.backward(loss / max(valid, 1) + weighed, last=last)
            if self.lanes is not None:
                self.lanes.advance(number)
        self.heartbeat("gradient norm and optimiser", step)
        norm = self.engine.clip(self.config.optim.max_grad_norm)
        every = sums.over(self.mesh.world.group)
        means = {
            name: value.item() for name, value in every.items() if "/" not in name
        }  # "layer/name": statistics
        loss = means.pop("loss")
        skip = self.guard.verdict(progress, loss, norm, predicts=valid > 0 or self.stream.pauses)
        figures = {}
        if skip is None:
            self.engine.step(rate)
            figures = on_step_end(self.engine.model, every)
            progress.tokens += valid
        else:
            self._leave_out(step, skip, held)
        progress.step = step
        progress.cursor = cursor
        self.meter.add(valid, self.flops(batch.span()))
        if skip is not None or _due(self.config.log.every, step, step in (1, self.config.steps)):
            beside = {
                "auxiliary": means or None,
                "statistics": figures or None,
                "skipped": skip and skip.row(),
            }
            self.log(self._row(progress, loss if valid else None, norm, rate)._replace(**beside))
        if skip is not None:
            self.guard.bear(progress, skip)

    def _leave_out(self, step: int, skip: SkippedStep, held: list[Held] | None) -> None:
        """Do not take a step. What its rows leave to the next is kept only where it is finite."""
        self.engine.skip()
        if self.lanes is not None and held is not None and not skip.finite:
            self.lanes.put_back(held)
        self.say(skip.line(step))

    def _row(self, progress: Progress, loss: float | None, norm: float, rate: float) -> MetricsRow:
        """What metrics.jsonl says of a step; memory is that of the fullest rank."""
        memory = torch.tensor(
            float(peak_memory_bytes(self.mesh.device)), dtype=torch.float64, device=self.mesh.device
        )
        if self.mesh.world.group is not None:
            dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        read = self.meter.read()
        return MetricsRow(
            step=progress.step,
            loss=loss,
            tokens=progress.tokens,
            tokens_per_second=read.tokens_per_second,
            step_seconds=read.step_seconds,
            grad_norm=norm,
            learning_rate=rate,
            peak_memory_bytes=int(memory.item()),
            mfu=read.mfu,
        )


def _due(every: int, step: int, last: bool) -> bool:
    """Whether something that happens every so many steps happens now; 0 is never, not at the end
    either."""
    return every > 0 and (step % every == 0 or last)
