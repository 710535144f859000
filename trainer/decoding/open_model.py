"""Opens a model to generate with: from a run, a checkpoint, an exported folder or a hub's."""

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from models.cache.base import KVCacheFactory
from trainer.config.groups import choices, file_of
from trainer.config.instantiate import instantiate
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.config.trust import stranger
from trainer.config.values import TARGET
from trainer.data.sources.base import build_source
from trainer.data.tokenizers import Tokenizer
from trainer.errors import UserError
from trainer.export import CONFIG, WEIGHTS, export, reopen
from trainer.files.limited_reader import json_object
from trainer.init_from.hub_folder import is_hub_folder, write_as_export


@dataclass
class OpenModel:
    """A model and what belongs to it.

    Attributes:
        model: on the CPU, in evaluation mode.
        tokenizer: of its training data.
        config: of its run.
    """

    model: nn.Module
    tokenizer: Tokenizer
    config: Config


def open_model(source: Path, trust: bool = False) -> OpenModel:
    """Opens the newest whole checkpoint of a run, a checkpoint, or an exported folder.

    Args:
        source: RUN_DIR, RUN_DIR/checkpoints/step_N, the folder of scripts.export, or that of a
            Hugging Face model.
        trust: build classes of other packages too, which the config names. That runs the code of
            whoever wrote them.

    Raises:
        UserError: nothing there, damaged, or not whole.
    """
    if is_hub_folder(source):
        with tempfile.TemporaryDirectory() as folder:
            write_as_export(source, Path(folder))
            return _opened(Path(folder), trust)
    # os.path takes a name that is too long for one that is not there; pathlib raises.
    if os.path.exists(source / WEIGHTS) or os.path.exists(source / CONFIG):
        return _opened(source, trust)
    with tempfile.TemporaryDirectory() as folder:
        export(source, Path(folder), trust)
        return _opened(Path(folder), trust)


def _opened(folder: Path, trust: bool) -> OpenModel:
    model = reopen(folder, trust).eval()
    config = Config.model_validate(json_object(folder / CONFIG)["config"])
    return OpenModel(model, build_source(as_node(config.data)).tokenizer(), config)


def named_cache(config: Config, name: str | None, settings: Mapping[str, Any]) -> KVCacheFactory:
    """Builds the cache of a config, or the one of another name.

    Args:
        config: of the run.
        name: of a file in conf/cache; None: that of the config.
        settings: values of single keys, in place of those there.

    Raises:
        UserError: no such name, or a setting that it does not take.
    """
    node = as_node(config.cache)
    if name is not None:
        names = choices("cache")
        if name not in names:
            raise UserError(f"unknown cache={name}; choose one of {', '.join(names)}")
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(file_of("cache", name)))
        except (OSError, OmegaConfBaseException) as error:
            raise UserError(f"cache={name}: {error}") from error
        assert isinstance(loaded, dict)
        node = {str(key): value for key, value in loaded.items()}
    node = {**node, **settings}
    if fault := stranger("cache", node[TARGET]):
        raise UserError(fault)
    return instantiate(node, {}, "cache")
