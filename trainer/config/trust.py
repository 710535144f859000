"""Limits a config that comes from a file to Longspan's own classes, each in its place.

A command line is the user's own and may name any class. A file may be a stranger's: to build
what it names is to run code of the stranger's choice. A user's own parts are built with
`trust=true` alone.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from models.cache.base import KVCacheFactory
from models.masks.algebra import Mask
from models.memory.base import Memory
from models.positions.base import Position
from models.scores import Score
from trainer.config.instantiate import TARGET
from trainer.config.schema import Config
from trainer.data.sources.base import Source
from trainer.errors import UserError
from trainer.files.import_by_name import import_module_of
from trainer.objectives.base import Objective
from trainer.optim import schedules
from trainer.optim.adamw import AdamW
from trainer.run_dir import plain_config

PACKAGES = ("models", "parallel", "trainer")
ENGINES = "parallel.engines."
LAYERS = ("model.mixers.", "model.feedforward")
PARTS = (nn.Module, Position, Memory, Mask, Score)
SCHEDULES = tuple(
    kind
    for kind in vars(schedules).values()
    if isinstance(kind, type) and kind.__module__ == schedules.__name__
)
KINDS: dict[
    str, tuple[type, ...]
] = {  # by place in the config; a node within one of them may be any of PARTS
    "model": (nn.Module,),
    "mixer": (nn.Module,),
    "position": (Position,),
    "memory": (Memory,),
    "cache": (KVCacheFactory,),
    "data": (Source,),
    "objective": (Objective,),
    "optim": (AdamW,),
    "schedule": SCHEDULES,
}


STAGE = re.compile(r"stages\.\d+\.")  # a stage names parts at the places of the run


def demand_own(config: Config, file: str) -> None:
    """Refuses every class that the config in `file` must not name; nothing foreign is imported.

    Raises:
        UserError: a line for each such class.
    """
    tree = plain_config(config)
    # Nothing that opens a file builds these: what is evaluated, the command line says anew.
    tree.pop("evaluation")
    tree.pop("logger")
    faults = [fault for place, target in targets(tree) if (fault := stranger(place, target))]
    if faults:
        way = f"if you know who wrote {file} and what these are, say trust=true"
        raise UserError(
            "\n".join(
                [
                    *(f"{file}: {fault}" for fault in faults),
                    f"{way}, which runs their code; nothing was built",
                ]
            )
        )


def targets(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the place and the name of every class that a plain config names, however deep."""
    if isinstance(value, Mapping):
        if TARGET in value:
            yield where, value[TARGET]
        for key, below in value.items():
            yield from targets(below, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            yield from targets(below, f"{where}.{index}")


def stranger(place: str, target: Any) -> str | None:
    """Returns why a class may not be named at a place; None where it may."""
    shown = f"{place}.{TARGET}={target}"
    place = STAGE.sub("", place)
    home, _, name = str(target).rpartition(".")
    if home.partition(".")[0] not in PACKAGES or not all(
        part.isidentifier() for part in home.split(".")
    ):
        return f"{shown} is no part of Longspan"
    if place == "engine":  # not built from a file, and slow to import
        return None if f"{home}.".startswith(ENGINES) else f"{shown} is no engine"
    layers = place.startswith(LAYERS) and place.count(".") <= 2
    kinds = (nn.Module,) if layers else KINDS.get(place, PARTS)
    if place.startswith("data.sources."):
        kinds = (Source,)
    try:
        found = getattr(import_module_of(str(target))[0], name, None)
    except ImportError:
        return f"{shown}: there is no module {home}"
    if not isinstance(found, type) or found.__module__ != home or not issubclass(found, kinds):
        return f"{shown} is no {' or '.join(kind.__name__ for kind in kinds)} of Longspan"
    return None
