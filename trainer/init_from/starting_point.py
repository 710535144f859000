"""The point that a stage goes on from: a checkpoint, or weights from elsewhere, or the seed's."""

from collections.abc import Callable
from pathlib import Path

from parallel.engines.base import Engine
from parallel.mesh import Mesh
from trainer.agreement import agree_on_resumed, agree_on_weights
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.stage_state import OtherStage
from trainer.checkpoint.writer import CheckpointWriter
from trainer.config.schema import Config
from trainer.config.stages import Stage
from trainer.data.lanes import Lanes
from trainer.data.streams.base import Stream
from trainer.errors import BAD_RUN, UserError
from trainer.init_from.adapters import read_adapter
from trainer.init_from.fit import ParameterSlots
from trainer.init_from.load import load_initial_weights
from trainer.optim.lengthening import steps_taken
from trainer.progress import Progress, restore_progress
from trainer.started_from import weight_lines


def starting_point(
    config: Config,
    stage: Stage,
    *,
    mesh: Mesh,
    engine: Engine,
    stream: Stream,
    lanes: Lanes | None,
    checkpoints: CheckpointWriter,
    slots: ParameterSlots,
    say: Callable[[str], None],
) -> Progress:
    """Fills the engine and the lanes, and returns the progress to go on from. Collective.

    That is the newest whole checkpoint of the directory, the one that resume= names, or the
    beginning.

    Raises:
        OtherStage: the checkpoint is of another stage.
        UserError: it cannot be read, or is of another run.
    """
    place = checkpoints.latest()
    if place is None and config.resume not in ("auto", "never"):
        place = _named(Path(config.resume), mesh, say)
    step = 0 if place is None else steps_taken(place)
    if not stage.after <= step <= config.steps:
        raise OtherStage(step)
    if place is None:
        _begin(config, mesh, engine, slots, say)
        return Progress(stream.start())
    progress = restore_progress(checkpoints, place, engine, stream, lanes, stage)
    agree_on_resumed(mesh=mesh, engine=engine, progress=progress.extra(), place=place)
    checkpoints.forget_after(progress.step)
    say(f"resumed from {place} at step {progress.step}")
    return progress


def _begin(
    config: Config, mesh: Mesh, engine: Engine, slots: ParameterSlots, say: Callable[[str], None]
) -> None:
    """Gives the model the weights that a setting names, and says what every layer begins with."""
    if config.init_from is not None:
        load_initial_weights(config, engine, slots, say)
        agree_on_weights(mesh, engine, f"after init_from={config.init_from} was read")
    if config.lora.adapter is not None:
        engine.load_weights(read_adapter(Path(config.lora.adapter)))
        agree_on_weights(mesh, engine, f"after lora.adapter={config.lora.adapter} was read")
    for line in weight_lines(engine.how):
        say(line)


def _named(source: Path, mesh: Mesh, say: Callable[[str], None]) -> Path:
    """Returns the checkpoint that resume=PATH names, of a run directory the newest one."""
    if not (source / "checkpoints").is_dir():
        return source
    archive = CheckpointReader(source / "checkpoints", group=mesh.world.group, say=say)
    try:
        place = archive.latest()
    finally:
        archive.close()
    if place is None:
        raise UserError(
            f"resume={source}: it holds no checkpoint yet; name another run, or resume=auto",
            BAD_RUN,
        )
    return place
