"""The loop: read a batch, add up the gradient of its micro-batches, step; log, evaluate, save; stop when asked to.

Every rank walks through the same steps and takes every decision together with the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from models.auxiliary import auxiliary, begin, forget, settle, statistics
from models.span import Span
from parallel.engines.engine import Engine
from parallel.launch import asked_by
from parallel.mesh import Mesh
from parallel.outcome import handling
from trainer.agreement import differing_batch, mark
from trainer.checkpoint import Checkpoints
from trainer.config import Config
from trainer.data.batch import Batch
from trainer.data.stream import Cursor, Stream
from trainer.guard import Guard, Skip
from trainer.lanes import Held, Lanes
from trainer.lengthening import Factor, factor, go_on
from trainer.logs.jsonl import Row
from trainer.logs.meters import Meter, peak_memory_bytes
from trainer.share import Share
from trainer.state import Part, Progress
from trainer.sums import Sums


class Stop:
    """Whether a signal asked the run to save and leave; asked together, so that all ranks leave at the same place."""

    def __init__(self, mesh: Mesh, signals: Any):
        self.mesh, self.signals, self.caught = mesh, tuple(signals), 0

    @contextmanager
    def listening(self) -> Iterator["Stop"]:
        """Take note of signals instead of dying of them."""
        with handling(self.signals, self._note):
            yield self

    def _note(self, number: int, frame: Any) -> None:
        self.caught = self.caught or asked_by(number)  # a second signal does not change the reason

    def asked(self, mine: int = 0, what: str = "the batch") -> bool:
        """True on every rank when any of them caught a signal; collective.

        Args:
            mine: the mark of what this rank is about to compute from (trainer/agreement.py); 0 = nothing to compare.
            what: what a message calls that.

        Raises:
            Fault: the ranks' marks are not all the same; on every rank.
        """
        word = torch.tensor([self.caught, mine, -mine], dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        caught, largest, smallest = word.tolist()
        if largest != -smallest:
            raise differing_batch(self.mesh, mine, what)
        self.caught = int(caught)
        return self.caught > 0


@dataclass
class Loop:
    """What a run is made of. `train` walks; the callables say what happens beside a step; `at` is told where a rank is.

    `due` names the parts of the evaluation of a step, and `evaluate` strikes from `progress.owed` those that it did.
    """

    config: Config
    mesh: Mesh
    engine: Engine
    stream: Stream
    share: Share
    checkpoints: Checkpoints
    schedule: Factor
    flops: Callable[[Span], float]
    meter: Meter
    stop: Stop
    log: Callable[[Row], None]
    evaluate: Callable[[Progress], object]
    due: Callable[[int], list[Part]] = lambda step: []
    say: Callable[[str], None] = print
    at: Callable[[str, int], None] = lambda phase, step: None
    lanes: Lanes | None = None
    saved: int = -1

    def __post_init__(self) -> None:
        self.guard = Guard(self.mesh, self.share, self.config.optim)

    def train(self, progress: Progress) -> Progress:
        """Steps until the last, or until a signal; `progress` is where the run stands afterwards."""
        self._set_length(progress)
        with self.meter.pause():
            self._assess(progress)  # what the checkpoint that the run goes on from owed
        while progress.step < self.config.steps:
            self.at("reading the batch", progress.step + 1)
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
                self.at("looking after the checkpoint and for signals", progress.step)
                self.checkpoints.poll()
        with self.meter.pause():
            if self.stop.caught and self.config.checkpoint.every and progress.step > max(self.saved, 0):
                self.save(progress)
            self.checkpoints.finish()
        return progress

    def _set_length(self, progress: Progress) -> None:
        """Note how long the run is to be, which may not be what it was to be before."""
        extend = self.config.schedule.extend
        progress.lengths, change = go_on(self.schedule, progress.lengths, progress.step, self.config.steps, extend)
        if change:
            self.say(change)

    def _assess(self, progress: Progress) -> None:
        """Do what is owed of this step's evaluation."""
        if progress.owed:
            self.at("evaluation", progress.step)
            self.evaluate(progress)

    def save(self, progress: Progress) -> None:
        """A checkpoint of where the run stands."""
        self.at("saving", progress.step)
        carried = {} if self.lanes is None else {"past": self.lanes.state()}
        self.checkpoints.save(progress.step, self.engine.state() | carried, progress.extra())
        self.saved = progress.step

    def _step(self, progress: Progress, batch: Batch, cursor: Cursor) -> None:
        """One optimiser step."""
        step = progress.step + 1
        rate = self.config.optim.learning_rate * factor(self.schedule, progress.lengths, step)
        valid = self.share.valid(batch)
        rows, sums = int(batch.span().valid().any(1).sum()), Sums()
        held = None if self.lanes is None else self.lanes.held()
        begin(self.engine.model, step)
        for number, (piece, last) in enumerate(self.share(batch)):
            span = piece.span if self.lanes is None else self.lanes.enter(number, piece.span)
            forget(self.engine.model)
            self.at(f"forward of micro-batch {number + 1}", step)
            with self.engine.forward_precision():
                losses = self.engine.model(piece.tokens, span, piece.targets)
            self.guard.look(losses)
            loss, beside = losses.sum(), auxiliary(self.engine.model, tokens=valid, rows=rows)
            sums.add({"loss": loss.detach().double() / max(valid, 1), **beside, **statistics(self.engine.model)})
            weighed = self.config.optim.auxiliary_weight * sum(beside.values(), torch.zeros_like(loss))
            self.at(f"backward of micro-batch {number + 1}", step)
            self.engine.backward(loss / max(valid, 1) + weighed, last=last)
            if self.lanes is not None:
                self.lanes.advance(number)
        self.at("gradient norm and optimiser", step)
        norm = self.engine.clip(self.config.optim.clip)
        every = sums.over(self.mesh.world_group)
        means = {name: value.item() for name, value in every.items() if "/" not in name}  # "layer/name": statistics
        loss = means.pop("loss")
        skip = self.guard.verdict(progress, loss, norm, predicts=valid > 0 or self.stream.pauses)
        figures = {}
        if skip is None:
            self.engine.step(rate)
            figures = settle(self.engine.model, every)
            progress.tokens += valid
        else:
            self._leave_out(step, skip, held)
        progress.step, progress.cursor = step, cursor
        self.meter.add(valid, self.flops(batch.span()))
        if skip is not None or _due(self.config.log.every, step, step in (1, self.config.steps)):
            beside = {"auxiliary": means or None, "statistics": figures or None, "skipped": skip and skip.row()}
            self.log(self._row(progress, loss if valid else None, norm, rate)._replace(**beside))
        if skip is not None:
            self.guard.bear(progress, skip)

    def _leave_out(self, step: int, skip: Skip, held: list[Held] | None) -> None:
        """Do not take a step. What its rows leave to the next is kept only where it is finite."""
        self.engine.skip()
        if self.lanes is not None and held is not None and not skip.finite:
            self.lanes.put_back(held)
        self.say(skip.line(step))

    def _row(self, progress: Progress, loss: float | None, norm: float, rate: float) -> Row:
        """What metrics.jsonl says of a step; memory is that of the fullest rank."""
        memory = torch.tensor(float(peak_memory_bytes(self.mesh.device)), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world_group is not None:
            dist.all_reduce(memory, op=dist.ReduceOp.MAX, group=self.mesh.world_group)
        read = self.meter.read()
        return Row(
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
    """Whether something that happens every so many steps happens now; 0 is never, not at the end either."""
    return every > 0 and (step % every == 0 or last)
