"""A stage of a run on one rank: builds the parts, resumes, trains, and closes the logs."""

import errno
import signal
from collections import Counter
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist

from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.span import Span
from parallel.engines.base import Engine
from parallel.mesh import Mesh
from trainer import run_dir as directories
from trainer.agreement import agree_on_run
from trainer.checkpoint.keep_rules import retention_of
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.build_model import build_model, sizes_taken
from trainer.config.instantiate import instantiate
from trainer.config.schema import Config
from trainer.config.stages import Stage, describe_stage
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.errors import BAD_RUN, DONE, UserError
from trainer.evaluation.assessment import Assessment
from trainer.init_from.fit import slots_of
from trainer.init_from.starting_point import starting_point
from trainer.launch.elastic import restart_count
from trainer.launch.exit_report import SAVED
from trainer.logs.console import Console
from trainer.logs.jsonl import MetricsRow
from trainer.logs.meters import Meter, Peak, peak
from trainer.logs.next_commands import next_commands
from trainer.logs.profile import StepProfiler
from trainer.logs.run_logger import RunLogger
from trainer.loop import Loop
from trainer.objectives.contradictions import remarks
from trainer.objectives.stream import open_rows
from trainer.optim.selection import count_trained
from trainer.placement import place
from trainer.progress import Progress
from trainer.stop_signal import StopSignal
from trainer.watchdog import EnterPhase, limit, watching

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SETTLE_S = 30.0  # how long a failing run waits for a pending checkpoint


def run_stage(
    config: Config, stage: Stage, mesh: Mesh, directory: Path, stop: StopSignal
) -> tuple[int, bool]:
    """Trains one stage; returns the exit status, and whether the run goes on with the next.

    Args:
        config: of the whole run, for its logs.
        stage: with its effective settings.
        mesh: the ranks.
        directory: of the run.
        stop: tells when a signal asked the run to stop.

    Raises:
        OtherStage: the checkpoint to go on from is of another stage.
    """
    console = Console(
        config.steps,
        speaks=mesh.world.rank == 0,
        style=config.log.console,
        level=config.log.level,
    )
    notes = directory / directories.SCRATCH / f"watch_{restart_count()[0]}"
    logs = RunLogger(directory, config, console, writes=mesh.world.rank == 0, notes=notes)
    with (
        logs.alerting(),
        watching(notes, mesh, config.launch.timeout_s) as heartbeat,
    ):
        try:
            return Run(stage, mesh, directory, console, stop, heartbeat, logs).whole()
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = (
                f"the disk under {directory} is full"
                if full
                else f"{error.filename or directory}: {error.strerror or error}"
            )
            way = "mend that and give the same command again"
            raise UserError(
                f"the run ended: {what}; the last whole checkpoint is intact; {way}", BAD_RUN
            ) from error
        finally:
            console.close()


class Run:
    """Builds the parts of a run, in the order in which they need each other, and trains."""

    def __init__(
        self,
        stage: Stage,
        mesh: Mesh,
        directory: Path,
        console: Console,
        stop: StopSignal,
        heartbeat: EnterPhase,
        logs: RunLogger,
    ):
        config = stage.config
        self.stage = stage
        self.config = config
        self.mesh = mesh
        self.directory = directory
        self.console = console
        self.stop = stop
        self.heartbeat = heartbeat
        self.first = mesh.world.rank == 0
        self.logs = logs
        self.stream = open_rows(config, "train")
        self.held_out = open_rows(config, "held_out") if config.evaluation.every else None
        for line in describe_stage(stage):
            console.say(line)
        console.say(f"data: {self.stream.describe(config.steps - stage.after)}")
        self.engine = self._engine()
        console.say(f"share: {self.share.describe()}")
        self.lanes = self._lanes(self.share)
        self.checkpoints = CheckpointWriter(
            directory / "checkpoints",
            keep=config.checkpoint.keep,
            retention=retention_of(config.checkpoint, stage.ends, directory),
            group=mesh.world.group,
            asynchronous=config.checkpoint.asynchronous,
            say=console.warn,
        )
        limit([self.checkpoints.control], config.launch.timeout_s)
        agree_on_run(
            mesh, self.engine, directories.plain_config(config), self.stream, self.held_out
        )

    def _engine(self) -> Engine:
        """Builds the model and the engine that trains it, parallelized and initialised."""
        config = self.config
        with torch.device("meta"):
            model = build_model(config, self.stream.vocabulary)
        self.parameters = count_parameters(model)
        trained = count_trained(model, config.optim.freeze)
        self.flops = count_flops(model)
        self.slots = slots_of(model)
        for line in remarks(config, model):
            self.console.say(line)
        for where, taken in sizes_taken(config, self.stream.vocabulary).items():
            if taken:
                self.console.say(
                    f"{where}: {', '.join(f'{key}={value}' for key, value in taken.items())}"
                )
        placement = place(config, self.mesh, model)
        self.communicator = placement.communicator
        self.share = placement.share
        if self.communicator is not None:
            self.communicator.timeout = timedelta(seconds=config.launch.timeout_s)
        of_them = f", {trained:,} of them trained" if trained < self.parameters.total else ""
        self.console.say(
            f"model: {self.parameters.total:,} parameters{of_them}; engine {config.engine.name},"
            f" {config.precision}"
        )
        return placement.engine

    def _lanes(self, share: BatchSharder) -> Lanes | None:
        """Builds empty lanes where `memory=` carries a state; None elsewhere."""
        return Lanes(self.mesh, share, self.config.rows) if self.config.memory.carries else None

    def whole(self) -> tuple[int, bool]:
        """Trains from the first step that is left, and closes.

        Returns:
            the exit status, and whether the run goes on with the next stage.
        """
        config = self.config
        progress = starting_point(
            config,
            self.stage,
            mesh=self.mesh,
            engine=self.engine,
            stream=self.stream,
            lanes=self.lanes,
            checkpoints=self.checkpoints,
            slots=self.slots,
            say=self.console.say,
        )
        self.console.go_on_from(progress.step)
        self._say_restarts()
        self.began = progress.step
        assessment = self._assessment()
        progress.wandb_id = self.logs.open(self.began, progress.wandb_id, **self._facts())
        meter = Meter(self._peak, self.mesh.world.size)
        self.console.say(meter.convention())
        assessment.resume(progress)
        loop = Loop(
            config=config,
            mesh=self.mesh,
            engine=self.engine,
            stream=self.stream,
            share=self.share,
            checkpoints=self.checkpoints,
            schedule=self.stage.schedule(instantiate(config.schedule, {}, "schedule")),
            flops=self.flops.training,
            meter=meter,
            stop=self.stop,
            log=self._log,
            evaluate=assessment.run,
            due=assessment.due,
            say=self.console.say,
            warn=self.console.warn,
            heartbeat=self.heartbeat,
            lanes=self.lanes,
            saved=progress.step,
            uncount=self._uncount,
            stage=self.stage if self.stage.count > 1 else None,
            profiler=StepProfiler(self.directory, config.log.profile, self.mesh, self.console.say),
        )
        try:
            loop.train(progress)
        except UserError:
            # The error is common to all ranks: a checkpoint on its way must not be lost with it.
            self.checkpoints.settle(SETTLE_S)
            raise
        self.checkpoints.close()
        return self._close(progress, assessment)

    def _say_restarts(self) -> None:
        times, most = restart_count()
        if times > 0:
            self.console.warn(
                f"a rank was lost: all were started again ({times} of"
                f" launch.max_restarts={most} times)"
            )

    def _assessment(self) -> Assessment:
        """Builds the evaluation of the run."""
        return Assessment(
            self.config,
            self.mesh,
            self.directory,
            engine=self.engine,
            share=self.share,
            stream=self.held_out,
            lanes=self._lanes,
            logs=self.logs,
            console=self.console,
            stopped=self.stop.asked,
        )

    @cached_property
    def _peak(self) -> Peak:
        """Peak FLOPs per second; measured on rank 0 alone, which reports the MFU."""
        return (
            peak(self.mesh.device, DTYPES[self.config.precision])
            if self.first
            else Peak(None, "only rank 0 tells")
        )

    def _facts(self) -> dict[str, float | None]:
        """Returns the figures of the model and the machine for summary.json.

        The bytes sent are known after a step, and anew after a resume on other ranks.
        """
        if not self.first:
            return {}
        length = self.config.context_length
        return {
            **({"sent_bytes_per_step": None} if self.began < self.config.steps else {}),
            "parameters": self.parameters.total,
            "active_parameters": self.parameters.active,
            "flops_per_token": self.flops.training(Span.line(1, length)) / length,
            "ranks": self.mesh.world.size,
        }

    def _uncount(self) -> None:
        if self.communicator is not None:
            self.communicator.bytes_sent.clear()

    def _sent(self) -> int:
        """Returns the bytes that the busiest rank has sent for sharing. Collective."""
        here = sum(self.communicator.bytes_sent.values()) if self.communicator is not None else 0
        sent = torch.tensor(float(here), dtype=torch.float64, device=self.mesh.device)
        if self.mesh.world.group is not None:
            dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self.mesh.world.group)
        return int(sent.item())

    def _log(self, row: MetricsRow) -> None:
        """Logs a step; after the first, the choices of parallel.method=auto are known too."""
        if self.communicator is not None and self.communicator.choices:
            for choice, many in Counter(self.communicator.choices.values()).items():
                self.console.say(
                    f"share: {many} of {len(self.communicator.choices)} layers by {choice}"
                )
            self.communicator.choices.clear()
        if self.lanes is not None and row.step == 1:
            lanes = self.share.rows_per_rank
            self.console.say(
                f"memory: rank 0 carries {self.lanes.bytes():,} bytes for its {lanes} lanes"
            )
        if row.step == self.began + 1:
            self.logs.note(sent_bytes_per_step=self._sent())
        self.logs.step(row)

    def _close(self, progress: Progress, assessment: Assessment) -> tuple[int, bool]:
        """Closes the logs, draws the plots, prints the last screen; see `whole`."""
        if not self.stage.is_last:
            self.stop.asked()  # all ranks go on, or none
        unfinished = progress.step < self.stage.run_steps or bool(progress.owed)
        caught = signal.Signals(self.stop.caught) if self.stop.caught and unfinished else None
        if (cost := assessment.cost()) is not None:
            self.console.say(cost)
        if (read := self.stream.progress(progress.cursor)) != "":
            self.console.say(f"data: {read}")
        goes_on = progress.step == self.config.steps and not self.stage.is_last and caught is None
        where = self.logs.close(progress.step, progress.tokens, progress.best, goes_on=goes_on)
        if goes_on:
            self.console.say(f"{self.stage.label} ended at step {progress.step}")
        elif self.first:
            self.console.finish(
                self.directory,
                stopped=caught.name if caught else None,
                owed=[f"{part} of step {progress.step}" for part in progress.owed],
                broken=assessment.broken,
                wandb=where,
                places=self.logs.places(),
                more=next_commands(self.config, self.directory),
            )
        if self.mesh.world.group is not None:
            dist.barrier(group=self.mesh.world.group)
        if goes_on:
            return DONE, True
        if caught:
            return SAVED[caught], False
        return BAD_RUN if progress.owed else DONE, False
