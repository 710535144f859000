"""Folders to write to, on machines that lack a home, a user name, or a disk where one is
expected."""

import getpass
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from trainer.errors import BAD_RUN, UserError

LOG = logging.getLogger("longspan.data")


def furnish() -> None:
    """Give this process, and those that it starts, what libraries take for granted: HOME and a user
    name.

    Without them W&B is switched off or fills the console, `datasets` makes a folder that is called
    `~`, and torch's compiler ends in a traceback. What the user set is left as it is.

    Raises:
        Fault: there is no folder for temporary files.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"TMPDIR: {error.strerror}; set TMPDIR to a folder that can be written", BAD_RUN
        ) from error
    try:
        getpass.getuser()
    except (KeyError, OSError):  # the kind differs between versions of Python
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    if not os.path.isabs(os.environ.get("HOME", "")):
        os.environ["HOME"] = str(home() or spare_folder("home", "a home folder is not known"))


def home() -> Path | None:
    """The user's home folder; None where nobody can say which that is (no HOME, and no such user on
    this machine)."""
    folder = os.path.expanduser("~")
    return Path(folder) if os.path.isabs(folder) else None


def writable(folder: Path | str) -> bool:
    """Says whether files can be made in a folder, which may have yet to be made itself; makes
    nothing."""
    path = os.path.abspath(folder)
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


@cache
def spare_folder(name: str, why: str) -> str:
    """A folder of this user's for temporary files, the same for every process; said in one line.

    Raises OSError where no folder for temporary files can be written.
    """
    folder = os.path.join(tempfile.gettempdir(), f"longspan-{os.getuid()}", name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    facts = os.stat(os.path.dirname(folder), follow_symlinks=False)
    if facts.st_uid != os.getuid():
        raise PermissionError(f"{os.path.dirname(folder)} is another user's")
    LOG.warning(
        "%s: %s is taken instead, and may be gone with the next start of the machine", why, folder
    )
    return folder
