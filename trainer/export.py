"""Exports a checkpoint of any ranks and engine as one safetensors file and one JSON file.

    OUTPUT/model.safetensors    every parameter and buffer whole, under its plain name, in the
                                precision of training
    OUTPUT/config.json          the run's config, the size of its vocabulary and the step

No pickle: any safetensors reader opens the weights, and opening them runs no code.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.lora import merged
from parallel.engines.base import STORED
from parallel.engines.materialize import materialize
from trainer import run_dir
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.wholeness import LARGEST
from trainer.config.build_model import build_model
from trainer.config.schema import Config, LoraConfig
from trainer.config.stages import config_at
from trainer.config.trust import demand_own
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import json_object
from trainer.init_from.sources import CheckpointWeights
from trainer.init_from.weights import CONFIG, WEIGHTS
from trainer.logs.redact import without_secrets
from trainer.objectives.stream import vocabulary_of
from trainer.optim.lengthening import steps_taken
from trainer.version import VERSION


class SavedModel(NamedTuple):
    """A model as a checkpoint holds it.

    Attributes:
        config: the effective settings of the stage that the checkpoint is of.
        vocabulary: of the model.
        step: of the run.
        model: on the meta device.
        tensors: its parameters and buffers; each is read whole when it is asked for.
    """

    config: Config
    vocabulary: int
    step: int
    model: nn.Module
    tensors: Mapping[str, Tensor]


class CheckpointTensors(Mapping[str, Tensor]):
    """Tensors of a checkpoint by the names that the model has for them.

    Each is read when it is asked for, and none is kept.

    Args:
        place: a folder step_N that was found whole.
        names: of the model's parameters and buffers, in its order.
    """

    def __init__(self, place: Path, names: Iterable[str]):
        self.weights = CheckpointWeights(place)
        self.names = list(names)

    def __getitem__(self, name: str) -> Tensor:
        return self.weights.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def export(source: Path, output: Path, trust: bool = False) -> int:
    """Writes the model of a checkpoint to a folder and returns its step, in one process.

    Adapters are merged into the weights that they stand beside.

    Args:
        source: a run directory (its newest whole checkpoint), or a checkpoint
            `.../checkpoints/step_N`.
        output: a folder, made where there is none; it must not hold an exported model yet.
        trust: build classes of other packages too, which the run's config names. That runs the code
            of whoever wrote them.

    Raises:
        UserError: a class that is not Longspan's, without trust; no run, no checkpoint or a damaged
            one, or a folder that holds a model already.
    """
    if taken := [name for name in (WEIGHTS, CONFIG) if os.path.lexists(output / name)]:
        raise UserError(f"{output} holds {' and '.join(taken)} already; name another folder")
    saved = read_model(source, trust)
    config = saved.config.model_copy(update={"lora": LoraConfig()})
    about = {
        "longspan": VERSION,
        "step": saved.step,
        "vocabulary": saved.vocabulary,
        "config": without_secrets(run_dir.plain_config(config)),
    }
    output.mkdir(parents=True, exist_ok=True)
    save_file(
        dict(merged(saved.model, saved.tensors)),
        output / WEIGHTS,
        metadata={"format": "pt", "step": str(saved.step)},
    )
    (output / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return saved.step


def read_model(source: Path, trust: bool = False) -> SavedModel:
    """Reads the model of a checkpoint, whatever ranks and engine wrote it; see `export`."""
    run = source if run_dir.holds_run(source) else source.parent.parent
    if not run_dir.holds_run(run):
        raise UserError(
            f"{source} is no run directory and no checkpoint of one; name RUN_DIR or"
            " RUN_DIR/checkpoints/step_N"
        )
    config = _config(run)
    if not trust:
        demand_own(config, str(run / run_dir.CONFIG))
    archive = CheckpointReader(run / "checkpoints")
    try:
        place = archive.latest() if source == run else source
        if place is None:
            raise UserError(f"{run} holds no checkpoint yet; train on, or set checkpoint.every")
        config = config_at(config, steps_taken(place))
        vocabulary = _vocabulary(config)
        with torch.device("meta"):
            model = build_model(config, vocabulary).to(STORED[config.precision])
        manifest = archive.admit(place, {"model": model.state_dict()})
    finally:
        archive.close()
    tensors = CheckpointTensors(place, model.state_dict())
    return SavedModel(config, vocabulary, manifest["step"], model, tensors)


def reopen(folder: Path, trust: bool = False) -> nn.Module:
    """Returns the model that `export` wrote, on the CPU, ready to be called.

    Args:
        trust: build classes of other packages too, which config.json names. That runs the code of
            whoever wrote them.

    Raises:
        UserError: a class that is not Longspan's, without trust; the folder holds no exported
            model, or one that does not fit its own config.
    """
    about: dict[str, Any] = {}
    try:
        about = json_object(folder / CONFIG)
        config = Config.model_validate(about["config"])
        vocabulary = about["vocabulary"]
        if not trust:
            demand_own(config, str(folder / CONFIG))
        weights = load_file(folder / WEIGHTS)
        if (
            type(vocabulary) is not int
            or not 0 < vocabulary < LARGEST
            or config.model.layers > len(weights)
        ):
            raise ValueError(
                f"a vocabulary of {vocabulary!r} and {config.model.layers} layers for"
                f" {len(weights)} tensors"
            )
        with torch.device("meta"):
            model = build_model(config, vocabulary)
        _fit(model, weights)
        materialize(model.to(next(iter(weights.values())).dtype), torch.device("cpu"), config.seed)
        model.load_state_dict(weights)
    except UserError as error:
        _refuse_newer(folder, about, error)
        raise
    except (OSError, KeyError, StopIteration, ValueError, RuntimeError, SafetensorError) as error:
        _refuse_newer(folder, about, error)
        raise UserError(
            f"{folder} holds no exported model that fits its config ({error}); export it again",
            BAD_RUN,
        ) from error
    return model


def _refuse_newer(folder: Path, about: dict[str, Any], error: Exception) -> None:
    """Raises UserError where an export that cannot be read is of a newer version of Longspan."""
    version = str(about.get("longspan", ""))
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        return
    if [int(part) for part in version.split(".")] <= [int(part) for part in VERSION.split(".")]:
        return
    raise UserError(
        f"{folder} was written by Longspan {version} and cannot be read by {VERSION}; install that"
        " version, or export the run again with this one",
        BAD_RUN,
    ) from error


def _config(run: Path) -> Config:
    """Returns the config that the run recorded; raises UserError where it holds none."""
    try:
        return run_dir.read_config(run)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{run / run_dir.CONFIG} cannot be read ({error}); name another run", BAD_RUN
        ) from error


def _fit(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise ValueError unless the weights have the names and shapes of the model's, before memory
    is taken for it."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if other := sorted(
        name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name)
    ):
        name = other[0]
        raise ValueError(
            f"{name} is {given.get(name, 'absent')} in {WEIGHTS} and {wanted.get(name, 'absent')}"
            " in the model"
        )


def _vocabulary(config: Config) -> int:
    """Returns the vocabulary of the model, or of data and objective where the config sets none."""
    return config.model.vocabulary or vocabulary_of(config)
