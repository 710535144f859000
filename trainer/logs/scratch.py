"""A folder of the run directory for the temporary folders of W&B: what a killed run leaves there, the next start clears."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path("wandb") / "tmp"


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Make temporary files and folders below the run directory, as long as this lasts.

    What W&B makes when it is imported it takes away when the process ends, but not when the process is killed. Only the one
    writer of the directory comes here, so whatever lies there is of a run that has ended.
    """
    folder = directory / FOLDER
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
