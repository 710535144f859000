"""The training loop: reads a batch, accumulates gradients over micro-batches, steps, logs, saves.

Every rank takes the same steps and every decision together with the others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from models.auxiliary import auxiliary_loss, on_step_begin, on_step_end, reset_auxiliary, statistics
from models.carried_state import CarriedState
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.engines.base import Engine
from parallel.mesh import Mesh
from parallel.row_pieces import piece_state
from parallel.rows_in_time import run_in_pieces
from trainer.checkpoint.writer import CheckpointWriter
from trainer.compile_trial import choose_compilation
from trainer.config.schema import Config
from trainer.config.stages import Stage
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.data.streams.prefetch import Prefetcher, StepInput
from trainer.logs.jsonl import MetricsRow
from trainer.logs.meters import Meter
from trainer.logs.profile import StepProfiler
from trainer.optim.lengthening import Factor, factor, go_on
from trainer.progress import Part, Progress
from trainer.step.pipeline import InputsAhead, LaunchedStep
from trainer.step.skip import SkippedStep, SkipStepGuard
from trainer.step.sums import StepSums
from trainer.stop_signal import StopSignal

NOTED_STEPS = 2  # of a start; under memory= the second is the first whose rows carry something


@dataclass
class Loop:
    """Trains a model that is built already.

    Attributes:
        config: the settings of the run.
        mesh: the ranks.
        engine: holds the model, its gradients and the optimiser.
        stream: the training data.
        share: cuts a batch into the micro-batches of this rank.
        checkpoints: writes checkpoints.
        schedule: factor of the learning rate, by step.
        flops: training FLOPs of the rows of a span, and of the sources of another.
        meter: measures speed, without the time spent on anything but training.
        stop: tells when a signal asked the run to stop.
        log: receives a row of metrics.jsonl.
        evaluate: does what `progress.owed` names, and strikes from it what is done.
        due: names the parts of the evaluation that a step is followed by.
        say: receives lines for the console.
        warn: receives those that a quiet console shows too.
        heartbeat: receives (phase, step) when this rank enters a phase.
        lanes: the carried state; None where rows carry nothing.
        saved: step of the last checkpoint; -1 where there is none.
        uncount: forgets the bytes that were counted as sent so far.
        stage: whose steps are taken; None = the run has one.
        profiler: traces the steps that log.profile names; None = no step.
    """

    config: Config
    mesh: Mesh
    engine: Engine
    stream: Stream
    share: BatchSharder
    checkpoints: CheckpointWriter
    schedule: Factor
    flops: Callable[[Span, Span | None], float]
    meter: Meter
    stop: StopSignal
    log: Callable[[MetricsRow], None]
    evaluate: Callable[[Progress], object]
    due: Callable[[int], list[Part]] = lambda step: []
    say: Callable[[str], None] = print
    warn: Callable[[str], None] = print
    heartbeat: Callable[[str, int], None] = lambda phase, step: None
    lanes: Lanes | None = None
    saved: int = -1
    uncount: Callable[[], None] = lambda: None
    stage: Stage | None = None
    profiler: StepProfiler | None = None

    def __post_init__(self) -> None:
        self.guard = SkipStepGuard(self.mesh, self.share, self.config.optim)
        self.steps_noted = 0
        self.launched: LaunchedStep | None = None  # whose figures lag
        self.prefetcher = Prefetcher(self.stream, self.share, self.config.prefetch, self.flops)
        self.inputs = InputsAhead(self.prefetcher, self.stop, self.config.steps)

    def train(self, progress: Progress) -> Progress:
        """Trains to the last step or to a signal; `progress` is updated and returned."""
        self._set_length(progress)
        with self.meter.pause():
            # A resumed run first does the evaluation that its checkpoint still owed.
            self._evaluate_owed(progress)
            self._choose_compilation(progress)
        try:
            self._take_steps(progress)
        finally:
            self.prefetcher.close()
        with self.meter.pause():
            unsaved = progress.step > max(self.saved, 0)
            if self.stop.caught and self.config.checkpoint.every and unsaved:
                self.save(progress)
            self.checkpoints.finish()
        return progress

    def _take_steps(self, progress: Progress) -> None:
        """Takes steps to the last one or to a signal."""
        while progress.step < self.config.steps:
            self.heartbeat("reading the batch", progress.step + 1)
            met = self.inputs.meet(progress.cursor, progress.step + 1)
            if met is None:
                self._catch_up(progress)
                break
            with self.profiler.around(progress.step + 1) if self.profiler else nullcontext():
                self.take_step(progress, met)
            self.steps_noted += 1
            progress.owed = self.due(progress.step)
            if progress.owed or self._saves(progress.step) or progress.step == self.config.steps:
                self._catch_up(progress)
            with self.meter.pause():
                self._after_step(progress)

    def _after_step(self, progress: Progress) -> None:
        """Saves and evaluates where this step is due for it."""
        # Saved first: an evaluation that fails must not cost the steps before it.
        if self._saves(progress.step):
            self.save(progress)
        self._evaluate_owed(progress)
        self.heartbeat("looking after the checkpoint and for signals", progress.step)
        self.checkpoints.poll()

    def _saves(self, step: int) -> bool:
        """Tells whether a checkpoint is due after a step."""
        return _is_due(self.config.checkpoint.every, step, step == self.config.steps)

    def _catch_up(self, progress: Progress) -> None:
        """Concludes the step whose figures lag."""
        launched, self.launched = self.launched, None
        self._conclude(progress, launched)

    def _set_length(self, progress: Progress) -> None:
        """Notes the number of steps, which may differ from that of an earlier start."""
        extend = self.config.schedule.extend
        progress.lengths, change = go_on(
            self.schedule, progress.lengths, progress.step, self._run_steps, extend
        )
        if change:
            self.say(change)

    @property
    def _run_steps(self) -> int:
        """Steps of the whole run, which the schedule lasts for."""
        return self.config.steps if self.stage is None else self.stage.run_steps

    def _evaluate_owed(self, progress: Progress) -> None:
        if progress.owed:
            self.heartbeat("evaluation", progress.step)
            self.evaluate(progress)

    def _choose_compilation(self, progress: Progress) -> None:
        """Keeps compiled blocks unless they are slower; a resumed run keeps what was chosen."""
        blocks = self.engine.compiled_blocks
        if not blocks or progress.step >= self.config.steps:
            return
        if progress.compiled is not None:
            for block in blocks:
                block.enabled = progress.compiled
            return
        # Before anything is read ahead: a stream has one reader at a time.
        met = self.inputs.meet_unread(progress.cursor, progress.step + 1)
        if met is None:  # before the first step there is nothing to choose for
            return
        progress.compiled = choose_compilation(
            blocks,
            lambda: self._rehearse(met._replace(cut=met.cut.copy()), progress.step + 1),
            self.mesh,
            self.say,
        )

    def _rehearse(self, given: StepInput, step: int) -> None:
        """Runs the passes of a step and undoes what they leave behind."""
        carried_before = None if self.lanes is None else self.lanes.held()
        self._accumulate_gradients(given, step)
        self.engine.skip()
        self.guard.noted()
        self.uncount()
        if self.lanes is not None and carried_before is not None:
            self.lanes.put_back(carried_before)

    def save(self, progress: Progress) -> None:
        """Writes a checkpoint of the engine, the carried state and the progress."""
        self.heartbeat("saving", progress.step)
        state = self.engine.state()
        if self.lanes is not None:
            state = state | {"past": self.lanes.state()}
        self.checkpoints.save(progress.step, state, progress.extra())
        self.saved = progress.step

    def take_step(self, progress: Progress, given: StepInput) -> None:
        """Takes one optimiser step, or leaves it out where the guard says so."""
        launched = self._launch(progress, given)
        progress.step = launched.number
        progress.cursor = given.cursor
        if self.config.log.lag:
            launched, self.launched = self.launched, launched
        self._conclude(progress, launched)

    def _launch(self, progress: Progress, given: StepInput) -> LaunchedStep:
        """Computes the gradients of a step; where figures lag the optimiser steps too."""
        step = progress.step + 1
        optim = self.config.optim
        learning_rate = optim.learning_rate * factor(self.schedule, progress.lengths, step)
        # What rows left behind before this step, in case the step has to be undone.
        carried_before = None if self.lanes is None else self.lanes.held()
        sums = self._accumulate_gradients(given, step)
        self.inputs.look_ahead(given.cursor, step + 1)
        self.heartbeat("gradient norm and optimiser", step)
        norm = self.engine.clip_unread(optim.max_grad_norm)
        launched = LaunchedStep(
            number=step,
            cursor=progress.cursor,
            counts=given.figures,
            learning_rate=learning_rate,
            unread=sums.send(self.mesh.world.group, norm),
            flags=self.guard.noted(),
            carried_before=carried_before,
        )
        if self.config.log.lag:
            if self._predicts(launched):
                self.engine.step_unless(launched.unread.unusable, learning_rate)
            else:
                self.engine.skip()
        return launched

    def _predicts(self, launched: LaunchedStep) -> bool:
        return launched.counts.valid_tokens > 0 or self.stream.pauses

    def _conclude(self, progress: Progress, launched: LaunchedStep | None) -> None:
        """Reads the figures of a step, steps or leaves it out, and logs it; None = nothing to do.

        Where figures lag the step itself is done, and its reading is all that is left.
        """
        if launched is None:
            return
        # One read for all of these; what else waits, tests/trainer/step/test_waits.py lists.
        totals, norm, largest = launched.unread.read()
        # "layer/name" are statistics of a layer; the other names are losses.
        losses = {name: total.item() for name, total in totals.items() if "/" not in name}
        loss = losses.pop("loss")
        batch = launched.cursor, launched.flags
        predicts = self._predicts(launched)
        skip = self.guard.verdict(progress, loss, norm, largest, batch=batch, predicts=predicts)
        layer_figures = {}
        valid_tokens = launched.counts.valid_tokens
        if skip is None:
            if not self.config.log.lag:
                self.engine.step(launched.learning_rate)
            layer_figures = on_step_end(self.engine.model, totals)
            progress.tokens += valid_tokens
        else:
            self._leave_out(launched, skip)
        self.meter.add(valid_tokens, launched.counts.flops)
        first_or_last = launched.number in (1, self.config.steps)
        if skip is not None or _is_due(self.config.log.every, launched.number, first_or_last):
            # A batch without a token to predict has no loss, and 0 would look like one.
            shown_loss = loss if valid_tokens else None
            row = launched.row(
                self.mesh, self.meter, tokens=progress.tokens, loss=shown_loss, norm=norm
            )
            self.log(
                row._replace(
                    stage=None if self.stage is None else self.stage.number,
                    auxiliary=losses or None,
                    statistics=layer_figures or None,
                    skipped=skip and skip.row(),
                )
            )
        if skip is not None:
            # After the row is written, because too many skipped steps end the run here.
            self.guard.bear(progress, skip)

    def _accumulate_gradients(self, given: StepInput, step: int) -> StepSums:
        """Runs forward and backward of every micro-batch.

        Args:
            given: this rank's micro-batches, and figures of all ranks' rows; every loss is divided
                by the tokens that are predicted on all ranks, so that micro-batches and ranks only
                add up.
            step: number of the step.

        Returns:
            this rank's sums: "loss", the auxiliary losses, and statistics under "layer/name".
        """
        model = self.engine.model
        valid_tokens, rows, _ = given.figures
        divisor = max(valid_tokens, 1)
        sums = StepSums()
        on_step_begin(model, step)

        def learn(piece: MicroBatch) -> Tensor:
            reset_auxiliary(model)
            loss = self._forward(piece)
            auxiliary = auxiliary_loss(model, tokens=valid_tokens, rows=rows)
            sums.add({"loss": loss.detach().double() / divisor})
            sums.add(auxiliary)
            sums.add(statistics(model))
            auxiliary_sum = sum(auxiliary.values(), torch.zeros_like(loss))
            return loss / divisor + self.config.optim.auxiliary_weight * auxiliary_sum

        for number, (pieces, last) in enumerate(given.micro_batches()):
            first = pieces[0]
            if self.lanes is not None:
                first = first.with_span(self.lanes.attach(number, first.span))
            self.heartbeat(f"forward of micro-batch {number + 1}", step)
            if len(pieces) > 1:
                self._in_time(pieces, first.span.past, learn, last=last)
            else:
                with self._noting_plans(first):
                    loss = learn(first)
                self.heartbeat(f"backward of micro-batch {number + 1}", step)
                self.engine.backward(loss, last=last)
            if self.lanes is not None:
                self.lanes.advance(number)
        return sums

    def _noting_plans(self, micro_batch: MicroBatch) -> AbstractContextManager[None]:
        """Notes what layers plan in the first steps, which the prefetch thread then makes ahead."""
        if not self.prefetcher.is_ahead or self.steps_noted >= NOTED_STEPS:
            return nullcontext()
        return self.prefetcher.plans.listening(micro_batch)

    def _in_time(
        self,
        pieces: list[MicroBatch],
        outer: CarriedState | None,
        learn: Callable[[MicroBatch], Tensor],
        *,
        last: bool,
    ) -> None:
        """Runs forward and backward of rows in pieces, one piece after another.

        Args:
            outer: what the rows before left.
            learn: returns the loss of a piece, with its gradient.
            last: whether these are the last rows of the step.
        """

        def look_ahead(number: int, span: Span) -> None:
            piece = pieces[number].with_span(span)
            untaught = piece._replace(targets=torch.full_like(piece.tokens, IGNORE))
            with self.engine.forward_precision():
                self.engine.model(untaught)

        run_in_pieces(
            piece_state([piece.span for piece in pieces], outer),
            look_ahead,
            lambda number, span: learn(pieces[number].with_span(span)),
            lambda loss, done: self.engine.backward(loss, last=last and done),
        )

    def _forward(self, micro_batch: MicroBatch) -> Tensor:
        """Returns the sum of the losses of a micro-batch, or of a piece of one."""
        with self.engine.forward_precision():
            losses = self.engine.model(micro_batch)
        self.guard.look(losses)
        return losses.sum()

    def _leave_out(self, launched: LaunchedStep, skip: SkippedStep) -> None:
        """Drops the gradients of a step; parameters and optimiser state stay as they are."""
        if not self.config.log.lag:
            self.engine.skip()
        # A state that is not finite would spoil every later step of its row.
        carried_before = launched.carried_before
        if self.lanes is not None and carried_before is not None and not skip.finite:
            self.lanes.put_back(carried_before)
        self.warn(skip.line(launched.number))


def _is_due(every: int, step: int, last: bool) -> bool:
    """Tells whether something that happens every `every` steps happens now; 0 means never."""
    return every > 0 and (step % every == 0 or last)
