"""The command `longspan KEY=VALUE ...`, which is `python -m trainer` from any folder."""

import importlib
import os
import sys
from typing import NoReturn


def console() -> NoReturn:
    """Runs the command, with the present folder on the path as `python -m` has it.

    A script of pip does not have it, and classes of the user's own lie there. The ranks are started
    by `python -m`, so what is found here is found there.
    """
    if not sys.flags.safe_path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    # After the path is as it will be: it says which packages are found.
    importlib.import_module("longspan.at_start")
    # Before the trainer, whose imports take seconds: a shell asks while a user types.
    status = importlib.import_module("longspan.completion").run(sys.argv[1:])
    if status is not None:
        sys.exit(status)
    importlib.import_module("trainer.__main__").console()
    raise AssertionError("the command ends the process")


if __name__ == "__main__":
    console()
