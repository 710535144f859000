"""Labels of a run in W&B: from the config, then W&B's own variables, then defaults.

They are checked before a run starts.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Config

FORBIDDEN = re.compile(r"[/\\#?%:]")  # in the name of a project; the server takes none of these
IDENTITY = re.compile(r"[A-Za-z0-9_.-]{1,128}")
PROJECT = "longspan"
LONGEST = {"project": 128, "entity": 128, "name": 128, "group": 128, "tags": 64}
VARIABLES = {
    "project": "WANDB_PROJECT",
    "entity": "WANDB_ENTITY",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "id": "WANDB_RUN_ID",
}
FOLDER = "WANDB_DIR"


@dataclass(frozen=True)
class Labels:
    """Labels of a run in W&B, and the folder that W&B writes to.

    Attributes:
        project: of the run.
        name: of the run.
        entity: user or team; None = the key's own.
        group: of runs, as of a sweep.
        tags: of the run.
        notes: of the run.
        identity: that the config gives the run; None = the run directory's own, or a new one.
        folder: W&B makes its folder wandb/ in it; None = the run directory.
    """

    project: str
    name: str
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    notes: str | None = None
    identity: str | None = None
    folder: Path | None = None


def variable(setting: str) -> str | None:
    """Returns W&B's own environment variable for a setting; None when unset or empty."""
    return os.environ.get(VARIABLES[setting]) or None


def labels(config: Config) -> Labels:
    """Returns the labels of a run."""
    wish = config.wandb
    folder = os.environ.get(FOLDER)
    return Labels(
        project=wish.project or variable("project") or PROJECT,
        name=wish.name or variable("name") or config.name,
        entity=wish.entity or variable("entity"),
        group=wish.group or variable("group"),
        tags=tuple(wish.tags or _tags(variable("tags"))),
        notes=wish.notes or variable("notes"),
        identity=wish.id,
        folder=Path(folder) if folder else None,
    )


def _tags(words: str | None) -> list[str]:
    return [tag.strip() for tag in (words or "").split(",") if tag.strip()]


def check_labels(config: Config) -> Iterator[str]:
    """Labels that W&B would not take, each under the name of the setting or the variable that holds
    it."""
    wish = config.wandb
    if wish.mode == "disabled":
        return
    for setting, name in VARIABLES.items():
        value = getattr(wish, setting)
        where = f"wandb.{setting}"
        if not value:
            value = _tags(variable("tags")) if setting == "tags" else variable(setting)
            where = name
        if value:
            yield from _misfits(setting, where, value)
    if folder := os.environ.get(FOLDER):
        yield from _unwritable(Path(folder))


def _misfits(setting: str, where: str, value: str | list[str]) -> Iterator[str]:
    words = [value] if isinstance(value, str) else value
    limit = LONGEST.get(setting)
    for word in words:
        if limit is not None and len(word) > limit:
            yield (
                f"{where}={word}: it has {len(word)} characters, but W&B takes {limit}; shorten it"
            )
    if not isinstance(value, str):
        return
    if setting == "project" and FORBIDDEN.search(value):
        entity, _, project = value.partition("/")
        way = "name it without them"
        if project and not FORBIDDEN.search(project + entity):
            way = f"use wandb.project={project} wandb.entity={entity}"
        yield f"{where}={value}: the name of a project holds none of / \\ # ? % : in W&B; {way}"
    if setting == "entity" and FORBIDDEN.search(value):
        yield (
            f"{where}={value}: the name of a user or team holds none of / \\ # ? % : in W&B; give"
            " the name alone"
        )
    if setting == "id" and not IDENTITY.fullmatch(value):
        yield (
            f"{where}={value}: an id has letters, digits, _ . and - alone, at most 128 of them;"
            " choose another"
        )


def _unwritable(folder: Path) -> Iterator[str]:
    """A folder in which W&B could make nothing; it would take another one in silence."""
    there = next(
        parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists()
    )
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield (
            f"{FOLDER}={folder}: {there} cannot be written to; name another folder, or unset"
            f" {FOLDER}"
        )
