"""Each choice of groups is composed once for all processes of the tests.

Hydra takes a fifth of a second for it, and a thousand tests in as many processes ask for the same
few hundred choices. What it gave lies, pickled, in a folder that the first process makes and all
others learn of by an environment variable. Folders of a test's own are composed as ever.
"""

import atexit
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from trainer.config import compose, groups
from trainer.config.own.folders import search_path

FOLDER = "LONGSPAN_TESTS_COMPOSED"


def share_composed() -> None:
    """From now on this process and what it forks take what is there and leave what is not."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = made = tempfile.mkdtemp(prefix="longspan-composed-")
        owner = os.getpid()
        atexit.register(lambda: os.getpid() == owner and shutil.rmtree(made, ignore_errors=True))
    folder = Path(os.environ[FOLDER])
    compose_here = compose._composed

    def composed(folders: tuple[Path, ...], chosen: tuple[str, ...]) -> bytes:
        if folders != (groups.CONF,) or search_path():
            return compose_here(folders, chosen)
        place = folder / hashlib.sha256(repr((folders, chosen)).encode()).hexdigest()
        try:
            return place.read_bytes()
        except FileNotFoundError:
            tree = compose_here(folders, chosen)
        beside = place.with_suffix(f".{os.getpid()}")
        beside.write_bytes(tree)
        beside.replace(place)
        return tree

    compose._composed = composed  # pyright: ignore
