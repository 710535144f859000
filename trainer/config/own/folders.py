"""The user's own folders of configuration: --config-dir FOLDER, hydra.searchpath=[file://FOLDER].

A folder is laid out like conf/: GROUP/NAME.yaml. Its files are chosen as Longspan's are, as
mixer=mine or experiment=mine, in every command. LONGSPAN_CONFIG_PATH names such folders for all
commands of a shell.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from trainer.config import groups
from trainer.config.groups import CONF, GLOBAL, OWN_FOLDERS
from trainer.errors import UserError

OPTION = "--config-dir"
SHORT = "-cd"  # Hydra's short form
SEARCH_PATH = "hydra.searchpath"
# Ranks read their config without these folders, and the names of engines are part of its schema.
CLOSED = ("engine", "hydra")


@contextmanager
def searching(words: Sequence[str]) -> Iterator[list[str]]:
    """Searches the folders that some words name for as long as the context lasts.

    Args:
        words: of a command line.

    Yields:
        The other words.

    Raises:
        UserError: a folder that is not there, or holds a file that cannot be chosen.
    """
    named, others = _split(words)
    entries = [*map(str, groups.own_folders()), *(str(path.resolve()) for path in named)]
    before = os.environ.get(OWN_FOLDERS)
    for entry in dict.fromkeys(entries):
        _vet(Path(entry))
    if entries:
        os.environ[OWN_FOLDERS] = os.pathsep.join(dict.fromkeys(entries))
    try:
        yield others
    finally:
        if before is not None:
            os.environ[OWN_FOLDERS] = before
        elif entries:
            del os.environ[OWN_FOLDERS]


def own_words() -> list[str]:
    """Returns the words with which another command finds the same folders."""
    return [f"{OPTION}={folder}" for folder in groups.own_folders()]


def search_path() -> list[str]:
    """Returns the word with which Hydra finds the same folders; none where there are none."""
    places = [_quoted(f"file://{folder}") for folder in groups.own_folders()]
    return [f"{SEARCH_PATH}=[{','.join(places)}]"] if places else []


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Returns the folders that some words name, and the other words."""
    named: list[Path] = []
    others: list[str] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        key, equals, value = word.partition("=")
        if key in (OPTION, SHORT):
            if not equals:
                value = waiting.pop(0) if waiting else ""
            if not value:
                raise UserError(f"{word}: it needs a folder; write {OPTION}=FOLDER")
            named.append(Path(value).expanduser())
        elif key.lstrip("+") == SEARCH_PATH and equals:
            entries = value.strip("[]").split(",")
            named += [_place(entry.strip(" '\""), word) for entry in entries if entry.strip()]
        else:
            others.append(word)
    return named, others


def _place(entry: str, word: str) -> Path:
    """Returns the folder of one entry of hydra.searchpath."""
    scheme, separator, rest = entry.partition("://")
    if not separator:
        return Path(entry).expanduser()
    if scheme == "file":
        return Path(rest).expanduser()
    if scheme != "pkg":
        raise UserError(f"{word}: an entry begins with file:// or pkg://; write file://FOLDER")
    try:
        spec = importlib.util.find_spec(rest.replace("/", "."))
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{word}: there is no package {rest}; write file://FOLDER")
    return Path(next(iter(spec.submodule_search_locations)))


@cache
def _vet(folder: Path) -> None:
    """Raises UserError for a folder that cannot be searched; cached, for its files stay."""
    if not folder.is_dir():
        raise UserError(
            f"{OPTION}={folder}: there is no such folder; name one with GROUP/NAME.yaml in it"
        )
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder)
        group = name.parts[0]
        if (CONF / name).is_file():
            raise UserError(f"{path}: Longspan has a {name.with_suffix('')}; name it otherwise")
        if group in CLOSED:
            raise UserError(f"{path}: a file cannot add to {group}; use {group}.KEY=VALUE")
        if len(name.parts) == 1 or (CONF / group).is_dir():
            continue
        if not path.read_text(encoding="utf-8").lstrip().startswith("# @package "):
            raise UserError(
                f"{path}: Longspan has no group {group}, so the file must say where its keys"
                f" belong; begin it with {GLOBAL}"
            )
