"""Folders to write to, also on machines without a home folder or a user name."""

import getpass
import logging
import os
import tempfile
from functools import cache
from pathlib import Path

from trainer.errors import BAD_RUN, UserError

LOG = logging.getLogger("longspan.data")


def furnish() -> None:
    """Sets HOME and a user name where they are missing, for this process and its children.

    Without them W&B is switched off or fills the console, `datasets` makes a folder that is called
    `~`, and torch's compiler ends in a traceback. Values that the user set are left as they are.

    Raises:
        UserError: there is no folder for temporary files.
    """
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(
            f"TMPDIR: {error.strerror}; set TMPDIR to a folder that can be written", BAD_RUN
        ) from error
    try:
        getpass.getuser()
    # The class of the error differs between versions of Python.
    except (KeyError, OSError):
        os.environ["LOGNAME"] = f"user{os.getuid()}"
    if not os.path.isabs(os.environ.get("HOME", "")):
        folder = home() or spare_folder("home", "a home folder is not known")
        os.environ["HOME"] = str(folder)


def home() -> Path | None:
    """Returns the user's home folder; None without HOME and without an entry for the user."""
    # expanduser returns "~" unchanged where it knows no home.
    folder = os.path.expanduser("~")
    return Path(folder) if os.path.isabs(folder) else None


def writable(folder: Path | str) -> bool:
    """Tells if files can be made in a folder, which need not exist yet; makes nothing."""
    path = os.path.abspath(folder)
    # Of a folder that does not exist, the nearest parent decides.
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return os.path.isdir(path) and os.access(path, os.W_OK | os.X_OK)


@cache
def spare_folder(name: str, why: str) -> str:
    """Makes a folder of this user for temporary files, the same for every process, and logs it.

    Args:
        name: of the folder.
        why: the reason that the log gives.

    Raises:
        OSError: no folder for temporary files can be written.
    """
    folder = os.path.join(tempfile.gettempdir(), f"longspan-{os.getuid()}", name)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # The parent's name can be guessed, so another user may have made it first.
    status = os.stat(os.path.dirname(folder), follow_symlinks=False)
    if status.st_uid != os.getuid():
        raise PermissionError(f"{os.path.dirname(folder)} is another user's")
    LOG.warning(
        "%s: %s is taken instead, and may be gone with the next start of the machine", why, folder
    )
    return folder
