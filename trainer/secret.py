"""The secret of a run directory, by which processes on several machines know one another."""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from trainer.errors import BAD_RUN, UserError
from trainer.files.safe_files import open_inside, read_inside

NAME = ".secret"


def shared_secret(directory: Path) -> str:
    """Returns the secret of a run directory; the first process that asks makes it.

    It appears whole, by one link, so that no process reads a part of it.

    Raises:
        UserError: it is another user's, or cannot be made.
    """
    try:
        if not (directory / NAME).exists():
            _make(directory)
        return read_inside(directory, NAME).decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"run_dir={directory}: its {NAME} cannot be used ({error}); remove that file, or choose"
            " another run_dir",
            BAD_RUN,
        ) from error


def _make(directory: Path) -> None:
    beside = f"{NAME}.{secrets.token_hex(8)}"
    handle = open_inside(directory, beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(handle, "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):  # another machine was faster
            os.link(directory / beside, directory / NAME)
    finally:
        os.unlink(directory / beside)
