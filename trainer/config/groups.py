"""Groups of the configuration folder: the names that can be chosen as GROUP=NAME."""

from pathlib import Path

# Groups whose members stand beside one another, each under its name.
BY_NAME = ("evaluation", "logger")
CONF = Path(__file__).resolve().parent.parent.parent / "conf"


def choices(group: str) -> list[str]:
    """Returns the names of a group, as in mixer=NAME."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def groups() -> list[str]:
    """Returns the groups that can be chosen, as in GROUP=NAME."""
    names = []
    for path in CONF.iterdir():
        if path.is_dir() and any(path.glob("*.yaml")):
            names.append(path.name)
    return sorted(names)


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
