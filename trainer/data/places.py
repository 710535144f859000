"""Folders to write to, on machines that lack a home, a user name, or a disk where one is expected."""

import logging
import os
import tempfile
from functools import cache
from pathlib import Path

LOG = logging.getLogger("longspan.data")


def home() -> Path | None:
    """The user's home folder; None where nobody can say which that is (no HOME, and no such user on this machine)."""
    folder = os.path.expanduser("~")
    return Path(folder) if os.path.isabs(folder) else None


def writable(folder: Path | str) -> bool:
    """Says whether files can be made in a folder, which may have yet to be made itself; makes nothing."""
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
    LOG.warning("%s: %s is taken instead, and may be gone with the next start of the machine", why, folder)
    return folder
