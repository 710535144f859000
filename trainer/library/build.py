"""Builds a model from settings, and checks settings without building anything."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from parallel.engines.base import STORED
from parallel.engines.materialize import materialize
from trainer.config.build_model import build_cache, build_model
from trainer.config.node_checks import as_node
from trainer.config.schema import Config
from trainer.data.sources.base import build_source
from trainer.errors import UserError
from trainer.init_from.adapters import read_adapter
from trainer.init_from.fit import compare, slots_of
from trainer.init_from.sources import open_weights
from trainer.library.loaded_model import LoadedModel
from trainer.library.words import settings_of
from trainer.objectives.stream import vocabulary_of
from trainer.preflight.prepare import load_config


def check(words: str | Sequence[str]) -> list[str]:
    """Checks the settings of a run as the command line does, and starts nothing.

    Args:
        words: "model=rwkv7 model.width=128", or a list of such settings.

    Returns:
        A message for each fault; none where the run could start.
    """
    try:
        with settings_of(words) as settings:
            load_config(settings, say=lambda line: None)
    except UserError as error:
        return str(error).splitlines()
    return []


def build(words: str | Sequence[str] = "") -> LoadedModel:
    """Builds the model that a run with these settings would begin with, on the CPU.

    Its weights are those of step 0: drawn from `seed`, or read where init_from= says so. Everything
    is checked as on the command line, the settings of training too.

    Args:
        words: "model=rwkv7 model.width=128", or a list of such settings.

    Raises:
        UserError: a line for each fault.
    """
    with settings_of(words) as settings:
        config = load_config(settings, say=lambda line: None)
        return LoadedModel(
            initial_model(config),
            build_source(as_node(config.data)).tokenizer(),
            config,
            build_cache(config),
        )


def initial_model(config: Config) -> nn.Module:
    """Returns the model of a config on the CPU with the weights of step 0."""
    vocabulary = config.model.vocabulary or vocabulary_of(config)
    with torch.device("meta"):
        model = build_model(config, vocabulary).to(STORED[config.precision])
    materialize(model, torch.device("cpu"), config.seed)
    if config.init_from is not None:
        read_weights(model, config.init_from, strict=config.init_from_strict)
    if config.lora.adapter is not None:
        adapter = dict(read_adapter(Path(config.lora.adapter)))
        model.load_state_dict(adapter, strict=False)
    return model.eval()


def read_weights(model: nn.Module, text: str, *, strict: bool) -> None:
    """Fills a model from what init_from= names.

    Args:
        model: on the CPU.
        text: RUN, CHECKPOINT, EXPORT or hf:FOLDER.
        strict: refuse weights that do not fit in everything; else what does not fit stays.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    source = open_weights(text, say=lambda line: None)
    slots = slots_of(model)
    fit = compare(source, slots)
    if strict and (differences := fit.text()):
        raise UserError(f"{text}: {differences}; give the model the sizes that it has there")
    tensors = model.state_dict()
    with torch.no_grad():
        for name, where in fit.fitting.items():
            tensors[name].copy_(source.read(where))
