"""Progress of a run: the part of a checkpoint that is no tensor, and resuming from it."""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from parallel.engines.base import Engine
from trainer.checkpoint.reader import CheckpointReader, LoadedCheckpoint
from trainer.checkpoint.wholeness import LARGEST, STEPS
from trainer.config.stages import Stage
from trainer.data.cursors import misfit
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.errors import BAD_RUN, UserError

WINDOW = 128  # finite gradient norms that the median is taken of
Norm = Annotated[FiniteFloat, Field(ge=0)]
# Of an evaluation: held_out, sample, maps, or the name of a further one.
PART = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
Part = Annotated[str, Field(pattern=f"^{PART.pattern}$")]


class Stretch(TypedDict):
    """A number of steps that the run was planned for, from the step behind `after` on.

    `extend` names how the learning rate was carried over to it.
    """

    after: Annotated[int, Field(ge=0, le=STEPS)]
    steps: Annotated[int, Field(ge=1, le=STEPS)]
    extend: Literal["hold", "restart", "stretch"] | None


@dataclass
class Progress:
    """Progress of a run; a checkpoint is checked against the types and ranges given here.

    Attributes: step: optimiser steps taken. tokens: trained on since the beginning. cursor: of the
        training data, for the next step. wandb_id: of the W&B run, so that a resumed run goes on in
        it; None without one. skipped: steps that were not taken, one after another, up to now
        (trainer/step/skip.py). norms: gradient norms of the last steps, for optim.skip_above. owed:
        parts of this step's evaluation that are due and not done
        (trainer/evaluation/assessment.py). lengths: how long the run was to be, and from which step
        on (trainer/optim/lengthening.py). compiled: whether compiled blocks serve; None where that
        was not measured (trainer/compile_trial.py). stage: number of the stage, from 1 on.
        data_after: the step behind which the present data began; a stage with other rows begins at
        their first.
    """

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")

    cursor: dict[str, Any]
    step: Annotated[int, Field(ge=0, le=STEPS)] = 0
    tokens: Annotated[int, Field(ge=0, le=LARGEST)] = 0
    wandb_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")] | None = None
    best: dict[str, FiniteFloat] = field(default_factory=dict)
    skipped: Annotated[int, Field(ge=0, le=STEPS)] = 0
    norms: Annotated[list[Norm], Field(max_length=WINDOW)] = field(default_factory=list)
    owed: list[Part] = field(default_factory=list)
    lengths: list[Stretch] = field(default_factory=list)
    compiled: bool | None = None
    stage: Annotated[int, Field(ge=1, le=STEPS)] = 1
    data_after: Annotated[int, Field(ge=0, le=STEPS)] = 0

    def begin_stage(self, number: int, stream: Stream) -> None:
        """Goes on into the next stage; other rows than those of the stage before begin anew.

        Sources of a mixture whose rows are the same go on where they were.
        """
        self.stage = number
        # The stage before was not over until its evaluation was done, or had failed.
        self.owed = []
        if _of_other_data(self.cursor, stream):
            self.cursor = stream.follow(self.cursor)
            self.data_after = self.step
            # Losses of rows of another length or kind are no measure for these.
            self.best = {}
            # Whether compiled blocks are faster depends on the length of rows.
            self.compiled = None

    def extra(self) -> dict[str, Any]:
        """Returns the dict that a checkpoint holds, without best values that are not finite."""
        best = {name: value for name, value in self.best.items() if math.isfinite(value)}
        return {**asdict(self), "best": best}


def progress_of(extra: dict[str, Any], step: int, place: Path) -> Progress:
    """Returns the progress that a checkpoint holds.

    Args:
        extra: the dict that was saved beside the tensors.
        step: the step that the checkpoint is named after.
        place: its folder, for messages.

    Raises:
        UserError: a field has another type or is out of its range.
    """
    try:
        progress = TypeAdapter(Progress).validate_json(json.dumps(extra))
    except (ValidationError, RecursionError) as error:
        first = (
            error.errors()[0]
            if isinstance(error, ValidationError)
            else {"loc": ("cursor",), "msg": "nested too deeply"}
        )
        where = ".".join(map(str, first["loc"]))[:100]
        raise UserError(
            f"cannot resume from {place}: {where}: {first['msg']}; it is damaged or was written by"
            " another version of Longspan; name another checkpoint, or begin again in another"
            " run_dir",
            BAD_RUN,
        ) from error
    if progress.step != step:
        raise UserError(
            f"cannot resume from {place}: it is of step {step} and says it had come to"
            f" {progress.step}",
            BAD_RUN,
        )
    return progress


def restore_progress(
    archive: CheckpointReader,
    place: Path,
    engine: Engine,
    stream: Stream,
    lanes: Lanes | None = None,
    stage: Stage | None = None,
) -> Progress:
    """Loads a checkpoint, written by any number of ranks, and returns its progress.

    Args:
        archive: reads it.
        place: its folder.
        engine: takes over its tensors.
        stream: of the training data.
        lanes: the carried state; None where rows carry nothing.
        stage: that goes on from it; None = the run has one.

    Raises:
        UserError: the checkpoint is of another run; raised before the engine takes over any of
            it.
    """
    extra = archive.extra(place)
    begins = stage is not None and stage.number > 1 and extra.get("step") == stage.after
    cursor = extra.get("cursor")
    reason = _of_other_data(cursor, stream) if isinstance(cursor, dict) else None
    if reason and not begins:  # before tensors that do not fit are told of
        raise UserError(f"cannot resume from {place}: {reason}", BAD_RUN)
    if reason:
        lanes = None  # rows that begin anew carry nothing over
    carried = {} if lanes is None else {"past": archive.blank(place, "past")}
    state = engine.state()
    saved: LoadedCheckpoint = archive.load(place, state | carried)
    progress = progress_of(saved.extra, saved.step, place)
    if stage is not None:
        _enter(progress, stage, place)
        if begins:
            progress.begin_stage(stage.number, stream)
    problem = _astray(progress, stream)
    if problem is None and lanes is not None:
        problem = lanes.misfit(saved.state["past"])
    if problem is not None:
        way = "name another checkpoint, or begin again in another run_dir"
        raise UserError(f"cannot resume from {place}: {problem}; {way}", BAD_RUN)
    if lanes is not None:
        lanes.load(saved.state.pop("past"))
    try:
        engine.load(saved.state)
    except ValueError as error:
        raise UserError(f"cannot resume from {place}: {error}", BAD_RUN) from error
    return progress


def _enter(progress: Progress, stage: Stage, place: Path) -> None:
    """Refuses a checkpoint that another stage saved, other than the end of the one before."""
    expected = stage.number - 1 if progress.step == stage.after else stage.number
    if progress.stage != max(expected, 1):
        raise UserError(
            f"cannot resume from {place}: stage {progress.stage} saved it, but its step"
            f" {progress.step} lies in {stage.label}; give the stages that the run began with, or"
            " name another checkpoint",
            BAD_RUN,
        )


def _of_other_data(cursor: dict[str, Any], stream: Stream) -> str | None:
    """Returns why a cursor belongs to other data than the stream's; None where it fits."""
    try:
        stream.admit(cursor)
    except ValueError as error:
        return str(error)
    return None


def _astray(progress: Progress, stream: Stream) -> str | None:
    """Returns why the training data cannot be read on from a checkpoint; None where it can."""
    if reason := _of_other_data(progress.cursor, stream):
        return reason
    beginning = stream.start()
    if problem := misfit(beginning, progress.cursor):
        return problem
    rows = progress.cursor["rows"]
    steps = progress.step - progress.data_after
    wanted = steps * stream.rows
    if rows != wanted:
        return (
            f"after {steps} steps of {stream.rows} rows its data would be at row {wanted},"
            f" not {rows}"
        )
    return None
