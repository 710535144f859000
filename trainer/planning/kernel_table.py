"""The words and the rows of `python -m scripts.kernels`."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.layer import hook
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.finding import Finding, render
from trainer.config.schema import Config
from trainer.errors import BAD_CONFIG, UserError
from trainer.objectives.stream import vocabulary_of
from trainer.planning.kernel_choices import (
    GENERATIONS,
    Choice,
    Setting,
    choices,
    situations_of,
    subject,
)
from trainer.planning.observed_calls import observe_calls

RANKS = 4  # of the ring that is told of where a run has one rank
SHORTEST = 2048  # tokens of a row: shorter ones say little of blocks
NUMBER = re.compile(r"\.\d+(?=\.|$)")


class KernelWords(NamedTuple):
    """The wishes of a command line.

    Attributes:
        config: of the run.
        device: a name of GENERATIONS, or cpu.
        ranks: of the ring.
        as_json: whether lines of JSON are printed.
    """

    config: Config
    device: str
    ranks: int
    as_json: bool


class KernelRow(NamedTuple):
    """A call of a model: where it is made, what it is, and who serves it in each situation."""

    places: str
    subject: str
    choices: list[Choice]


def read_kernel_words(words: Sequence[str]) -> KernelWords:
    """Tells the words of the command from the overrides of the run.

    Raises:
        UserError: a word that says nothing, or a config that is refused.
    """
    own = {"device": "h200", "gpus": "", "json": "false"}
    overrides = []
    for word in words:
        key, found, value = word.partition("=")
        if found and key in own:
            own[key] = value
        else:
            overrides.append(word)
    if own["device"] not in (*GENERATIONS, "cpu"):
        known = ", ".join((*GENERATIONS, "cpu"))
        _refuse("device", own["device"], "is no device of this table", f"use one of {known}")
    if own["gpus"] and (not own["gpus"].isdecimal() or int(own["gpus"]) < 1):
        _refuse("gpus", own["gpus"], "must be a number of ranks", "use gpus=4")
    if own["json"] not in ("true", "false"):
        _refuse("json", own["json"], "must be true or false", "leave it out to read a table")
    composed = compose([*overrides, "launch.force=true"])
    if composed.faults or composed.config is None:
        raise UserError("\n".join(composed.faults), BAD_CONFIG)
    config = composed.config
    ranks = int(own["gpus"] or config.parallel.context)
    if ranks == 1 and not own["gpus"]:
        ranks = RANKS
    return KernelWords(config, own["device"], ranks, own["json"] == "true")


def kernel_rows(asked: KernelWords) -> list[KernelRow]:
    """Returns a row for each kind of call; layers that are alike share one.

    Raises:
        UserError: a model that reads a second stream.
    """
    config = asked.config
    vocabulary = vocabulary_of(config)
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    if hook(model, "reads_source"):
        fact = "a model that reads a source is not passed through"
        _refuse("model", config.model.target, fact, "ask for its decoder alone, as model=full")
    device = torch.device("cpu" if asked.device == "cpu" else "cuda")
    tokens = max(SHORTEST, config.context_length)
    situations = situations_of(tokens, asked.ranks, config.parallel.layout)
    generation = GENERATIONS.get(asked.device, (0, 0))
    setting = Setting(device, generation, tuple(situations))
    places: dict[tuple[str, tuple[Choice, ...]], list[str]] = {}
    for place, call in observe_calls(config, vocabulary, device):
        row = subject(call), tuple(choices(call, setting))
        alike = places.setdefault(row, [])
        if place not in alike:
            alike.append(place)
    return [KernelRow(_joined(names), said, list(each)) for (said, each), names in places.items()]


def _joined(places: list[str]) -> str:
    """Returns names that differ by the number of a layer as one, with how many there are."""
    kinds: dict[str, int] = {}
    for place in places:
        kind = NUMBER.sub(".*", place)
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind} x {count}" for kind, count in kinds.items())


def _refuse(key: str, value: str, fact: str, remedy: str) -> None:
    raise UserError(render(Finding(key, value, fact, remedy)), BAD_CONFIG)
