"""Imports what a dotted name of a config stands for."""

import importlib
from types import ModuleType


def import_module_of(target: str) -> tuple[ModuleType, str]:
    """Imports the module that a class is in.

    Args:
        target: package.module.Class.

    Returns:
        the module and the last word of the name.

    Raises:
        ImportError: the name is no dotted name, there is no such module, or its code failed, with
            whatever error: a module of the user's own may raise anything, or end the process.
    """
    home, _, name = target.rpartition(".")
    # A leading dot would make Python ask for a package that the name is relative to.
    if not home or not all(word.isidentifier() for word in target.split(".")):
        raise ImportError("it is no dotted name of a class")
    try:
        return importlib.import_module(home), name
    except ImportError:
        raise
    except (Exception, SystemExit) as error:
        raise ImportError(f"importing {home} raised {type(error).__name__}: {error}") from error
