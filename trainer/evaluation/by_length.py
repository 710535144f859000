"""Held-out loss by position of the checkpoints between stages, all in rows of the longest stage.

Each checkpoint is read under the positions that it was trained with, and those before the last also
under the last stage's, untrained: what the change of positions does by itself.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models.causality import plain_sight
from parallel.engines.base import STORED
from parallel.engines.materialize import materialize
from parallel.mesh import Mesh
from trainer import run_dir
from trainer.checkpoint.reader import CheckpointReader
from trainer.config.build_model import build_model
from trainer.config.schema import Config
from trainer.config.stages import Stage, plan_of
from trainer.config.trust import demand_own
from trainer.data.batch_sharding import BatchSharder
from trainer.data.lanes import Lanes
from trainer.errors import BAD_RUN, UserError
from trainer.evaluation.held_out import HeldOutResult, evaluate
from trainer.objectives.stream import open_rows

FIRST_SHOWN = 256  # position; the first tokens of a document are hard for every model


class LengthResult(NamedTuple):
    """Loss by position of one checkpoint under one position scheme.

    Attributes:
        stage: that ended with the checkpoint.
        position: class of the position scheme that it was read with.
        trained: whether it was trained with that scheme.
        context_length: tokens of a row.
        result: of the held-out rows.
    """

    stage: Stage
    position: str
    trained: bool
    context_length: int
    result: HeldOutResult


def losses_by_length(
    directory: Path, batches: int, trust: bool = False, say: Callable[[str], None] = print
) -> Iterator[LengthResult]:
    """Yields the losses of every stage's last checkpoint, in one process.

    Args:
        directory: of a run in stages; a run without stages has one.
        batches: held-out batches of the longest stage, each as in its training.
        trust: build classes of other packages too, which the run's config names.
        say: takes a line about a checkpoint that is left out.

    Raises:
        UserError: no run, no checkpoint, or settings that cannot be read.
    """
    try:
        config = run_dir.read_config(directory)
    except (ValueError, OSError) as error:
        raise UserError(f"{directory} is no run directory ({error}); name one", BAD_RUN) from error
    if not trust:
        demand_own(config, str(directory / run_dir.CONFIG))
    plan = plan_of(config)
    longest = max(plan, key=lambda stage: stage.config.context_length).config
    archive = CheckpointReader(directory / "checkpoints")
    found = False
    for stage in plan:
        place = directory / "checkpoints" / f"step_{stage.config.steps:08d}"
        if not place.is_dir():
            say(f"{stage.label}: there is no {place.name} yet, so it is left out")
            continue
        found = True
        own = stage.config
        yield _measured(archive, place, stage, own, longest, batches)
        if own.position != longest.position:
            other = own.model_copy(update={"position": longest.position})
            yield _measured(archive, place, stage, other, longest, batches, trained=False)
    if not found:
        raise UserError(f"{directory} holds no checkpoint of a stage's end; train on", BAD_RUN)


def _measured(
    archive: CheckpointReader,
    place: Path,
    stage: Stage,
    config: Config,
    longest: Config,
    batches: int,
    *,
    trained: bool = True,
) -> LengthResult:
    """Evaluates a checkpoint under the positions of `config`, in the rows of `longest`."""
    rows = {"context_length": longest.context_length, "batch_tokens": longest.batch_tokens}
    config = config.model_copy(update={**rows, "data": longest.data})
    stream = open_rows(config, "held_out")
    model = _loaded(archive, place, config, stream.vocabulary)
    mesh = Mesh.alone()
    share = BatchSharder(
        mesh,
        rows=config.rows,
        context_length=config.context_length,
        micro_batch=1,
        policy=config.parallel.layout,
        prefix=plain_sight(model),
        time=config.parallel.time,
    )
    lanes = Lanes(mesh, share, config.rows) if config.memory.carries else None
    result = evaluate(model, share, stream, batches, lambda mark, what: False, lanes)
    assert result is not None, "nothing interrupts it"
    position = config.position.target.rpartition(".")[2]
    return LengthResult(stage, position, trained, config.context_length, result)


def _loaded(archive: CheckpointReader, place: Path, config: Config, vocabulary: int) -> nn.Module:
    """Returns the model of a checkpoint on the CPU, in evaluation mode."""
    with torch.device("meta"):
        model = build_model(config, vocabulary).to(STORED[config.precision])
    materialize(model, torch.device("cpu"), config.seed)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(archive.load(place, {"model": state}).state["model"])
    return model.eval()


def table(results: list[LengthResult]) -> str:
    """Returns the losses as a markdown table, a column for each range of positions from 256 on."""
    begins: list[int] = []
    for entry in results:
        for row in entry.result.by_position:
            if row["begin"] >= FIRST_SHOWN and row["begin"] not in begins:
                begins.append(row["begin"])
    begins.sort()
    heads = [f"{begin} to {2 * begin}" for begin in begins]
    lines = [
        f"| checkpoint | positions | {' | '.join(heads)} |",
        f"|---|---|{'---|' * len(heads)}",
    ]
    for entry in results:
        losses = {row["begin"]: row["loss"] for row in entry.result.by_position}
        cells = [f"{losses[begin]:.3f}" if begin in losses else "" for begin in begins]
        scheme = entry.position if entry.trained else f"{entry.position}, untrained"
        name = f"after {entry.stage.name}, step {entry.stage.config.steps}"
        lines.append(f"| {name} | {scheme} | {' | '.join(cells)} |")
    return "\n".join(lines)
