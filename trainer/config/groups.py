"""Groups of the configuration: the names that can be chosen as GROUP=NAME.

They lie in conf/, and in folders of the user's own (trainer/config/own/folders.py), whose names are
kept in the environment so that ranks, jobs of a sweep and a shell's completion know them too.
"""

import os
from functools import lru_cache
from pathlib import Path

# Groups whose members stand beside one another, each under its name.
BY_NAME = ("evaluation", "logger")
CONF = Path(__file__).resolve().parent.parent.parent / "conf"
OWN_FOLDERS = "LONGSPAN_CONFIG_PATH"  # of the environment; written as PYTHONPATH is
RECIPES = "experiment"
GLOBAL = "# @package _global_"  # Hydra's mark of a file whose keys are those of the whole config


def own_folders() -> tuple[Path, ...]:
    """Returns the user's own folders of configuration, in the order in which they are searched."""
    entries = os.environ.get(OWN_FOLDERS, "").split(os.pathsep)
    return tuple(Path(entry) for entry in entries if entry)


def folders() -> tuple[Path, ...]:
    """Returns every folder of configuration, Longspan's first."""
    return (CONF, *own_folders())


def files(group: str) -> list[Path]:
    """Returns the yaml files of a group, by name."""
    found = [path for folder in folders() for path in (folder / group).glob("*.yaml")]
    return sorted(found, key=lambda path: path.stem)


def file_of(group: str, name: str) -> Path:
    """Returns the file of one member of a group; where there is none, where Longspan's would be."""
    for folder in folders():
        path = folder / group / f"{name}.yaml"
        if path.is_file():
            return path
    return CONF / group / f"{name}.yaml"


def choices(group: str) -> list[str]:
    """Returns the names of a group, as in mixer=NAME."""
    return [path.stem for path in files(group)]


def groups() -> list[str]:
    """Returns the groups that can be chosen, as in GROUP=NAME."""
    names = set()
    for folder in folders():
        # Longspan's own folder does not change while it runs, and is asked for at every word.
        names |= _own_groups(folder) if folder == CONF else _groups_in(folder)
    # Files in a folder of configuration itself are of no group, and Hydra's own are not chosen.
    return sorted(name for name in names if name != "." and not name.startswith("hydra/"))


def _groups_in(folder: Path) -> frozenset[str]:
    """Returns the folders below this one that have a yaml file, by their relative paths."""
    return frozenset(path.parent.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))


_own_groups = lru_cache(maxsize=1)(_groups_in)


def is_own_group(group: str) -> bool:
    """Tells whether a group is the user's own, so that conf/train.yaml does not choose in it."""
    return is_folder(group) and not any((CONF / group).glob("*.yaml"))


def choice_for_hydra(word: str) -> str:
    """Returns GROUP=NAME as Hydra is to read it: what conf/train.yaml does not choose is added."""
    plain = word.lstrip("+")
    return f"+{plain}" if is_own_group(plain.partition("=")[0]) else plain


def is_recipe(group: str, name: str) -> bool:
    """Tells whether a member of a group sets keys of the whole config, as an experiment does."""
    if not has_choice(group, name):
        return False
    if group.partition("/")[0] == RECIPES:
        return True
    path = file_of(group, name)
    return is_own_group(group) and path.read_text(encoding="utf-8").lstrip().startswith(GLOBAL)


def is_hydra_key(key: str) -> bool:
    """Tells whether a key is one of Hydra's own settings."""
    return key == "hydra" or key.startswith(("hydra.", "hydra/"))


def is_group(key: str) -> bool:
    """Tells whether a key chooses a member of a group, also as GROUP@PLACE."""
    if not key or is_hydra_key(key):
        return False
    return is_folder(key.partition("@")[0])


def is_folder(name: str) -> bool:
    """Tells whether a name is that of a group.

    Names are compared, never tried as paths: what a user types may be too long for one, or lead out
    of the folder.
    """
    return name in groups()


def has_choice(group: str, name: object) -> bool:
    """Tells whether a group has a member of that name."""
    return is_folder(group) and str(name) in choices(group)
