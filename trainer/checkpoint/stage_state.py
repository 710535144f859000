"""The stage that a run is in, kept in its directory: stage.json, beside the checkpoints.

A stage is over when its last step is saved and evaluated; only then rank 0 writes the number of the
next. A kill before that leads back into the stage, which does what it still owes and ends.
"""

import json
from pathlib import Path

import torch.distributed as dist

from trainer.config.schema import Config
from trainer.config.stages import Stage, plan_of, stage_of_step
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside
from trainer.optim.lengthening import resumed_from, steps_taken

STATE = "stage.json"


class OtherStage(Exception):
    """The checkpoint to go on from is of another stage than stage.json says.

    That happens where the newest checkpoint is damaged and the one before is of an earlier stage.

    Attributes:
        step: of that checkpoint; 0 where there is none.
    """

    def __init__(self, step: int):
        super().__init__(f"step {step} is of another stage")
        self.step = step


def present_stage(config: Config, directory: Path) -> Stage:
    """Returns the stage that the run in `directory` is in, or is to begin with.

    Raises:
        UserError: stage.json holds no number of a stage.
    """
    plan = plan_of(config)
    path = directory / STATE
    if path.is_file():
        try:
            number = json_object(path, follow=False).get("stage")
        except (ValueError, OSError) as error:
            raise _damaged(path, str(error)) from error
        if type(number) is not int or not 1 <= number <= len(plan):
            raise _damaged(path, f"it names stage {number} of {len(plan)}")
        return plan[number - 1]
    place = resumed_from(config)
    taken = 0 if place is None else steps_taken(place)
    return stage_of_step(plan, taken) if taken else plan[0]


def agreed_stage(config: Config, directory: Path) -> Stage:
    """Returns the stage that rank 0 finds, on every rank. Collective."""
    box = [present_stage(config, directory).number]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return plan_of(config)[box[0] - 1]


def note_stage(directory: Path, stage: Stage) -> None:
    """Writes the stage that the run goes on with; it is replaced whole."""
    state = {"stage": stage.number, "name": stage.name, "after": stage.after}
    replace_inside(directory, STATE, json.dumps(state) + "\n")


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is damaged ({why}); remove it, and the newest checkpoint says the stage", BAD_RUN
    )
