"""Imports what a dotted name of a config stands for, or says why not, and where it was sought."""

import importlib
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType

REMEDY = "start in the folder that holds it, or put that folder on PYTHONPATH"
SYNTAX = "name a class as package.module.Class"


def import_module_of(target: str) -> tuple[ModuleType, str]:
    """Imports the module that a class is in.

    Args:
        target: package.module.Class.

    Returns:
        the module and the last word of the name.

    Raises:
        ImportError: the name is no dotted name, there is no such module, or its code failed, with
            whatever error: a module of the user's own may raise anything, or end the process. The
            message is for the user and ends with a remedy.
    """
    home, _, name = target.rpartition(".")
    # A leading dot would make Python ask for a package that the name is relative to.
    if not home or not all(word.isidentifier() for word in target.split(".")):
        raise ImportError(f"it is no dotted name of a class; {SYNTAX}")
    try:
        return importlib.import_module(home), name
    except ModuleNotFoundError as error:
        missing = str(error.name)
        # What the module itself imports is looked for in vain: that is an error of the module.
        if home == missing or home.startswith(f"{missing}."):
            raise ImportError(_absent(home, missing)) from error
        raise ImportError(_raised(home, error)) from error
    except (Exception, SystemExit) as error:
        raise ImportError(_raised(home, error)) from error


def searched_folders() -> list[str]:
    """Returns the folders in which modules are looked for, without Python's own."""
    standard = Path(sysconfig.get_path("stdlib"))
    folders: dict[str, None] = {}
    for entry in sys.path:
        path = Path(entry or ".").resolve()
        is_standard = path == standard or (path.parent == standard and path.name == "lib-dynload")
        if not is_standard and path.suffix != ".zip":
            folders.setdefault(str(path))
    return list(folders)


def _absent(home: str, missing: str) -> str:
    parent, _, last = missing.rpartition(".")
    if not parent:
        return f"there is no module {home}; looked for in {', '.join(searched_folders())}; {REMEDY}"
    places = [str(place) for place in getattr(sys.modules.get(parent), "__path__", ())]
    if places:
        return f"there is no module {last} in {', '.join(places)}; {SYNTAX}"
    return f"{parent} is a module and no package, so there is no {missing}; {SYNTAX}"


def _raised(home: str, error: BaseException) -> str:
    """Returns the message about an error that a module raised, with the place in its source."""
    said = " ".join(str(error).split()) or "no message"
    if isinstance(error, SyntaxError):
        said = str(error.msg)
        place = f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        # The last frame outside the machinery of imports is where the module itself stands.
        own = [frame for frame in frames[1:] if "importlib" not in frame.filename]
        place = f"{own[-1].filename}, line {own[-1].lineno}" if own else f"module {home}"
    return f"importing {home} raised {type(error).__name__}: {said} ({place}); mend that first"
