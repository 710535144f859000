"""A folder of the run directory for the temporary folders of W&B: what a killed run leaves there,
the next start clears."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.files.safe_files import make_inside

FOLDER = Path("wandb") / "tmp"


@contextmanager
def inside(directory: Path) -> Iterator[None]:
    """Make temporary files and folders below the run directory, as long as this lasts.

    What W&B makes when it is imported it takes away when the process ends, but not when the process
    is killed. Only the one writer of the directory comes here, so whatever lies there is of a run
    that has ended.
    """
    directory.mkdir(parents=True, exist_ok=True)
    folder = (
        make_inside(directory, str(FOLDER.parent)) / FOLDER.name
    )  # refused behind a link: it would clear elsewhere
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    make_inside(directory, str(FOLDER))
    before = tempfile.tempdir
    tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before
