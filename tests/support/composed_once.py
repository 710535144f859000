"""Each choice of groups is composed once for all processes of the tests.

Hydra takes a fifth of a second for it, and a thousand tests in as many processes ask for the same
few hundred choices. What it gave lies, pickled, in a folder that tests/conftest.py makes and all
processes learn of by an environment variable. Folders of a test's own are composed as ever.
"""

import hashlib
import os
from pathlib import Path

# By name: tests of security watch the functions of the module.
from pickle import dumps, loads

from omegaconf import DictConfig

from trainer.config import compose, groups
from trainer.config.own.folders import search_path

FOLDER = "LONGSPAN_TESTS_COMPOSED"


def share_composed() -> None:
    """From now on this process and what it forks take what is there and leave what is not."""
    if FOLDER not in os.environ:
        return
    folder = Path(os.environ[FOLDER])
    compose_here = compose._composed

    def composed(folders: tuple[Path, ...], chosen: tuple[str, ...]) -> DictConfig:
        if folders != (groups.CONF,) or search_path():
            return compose_here(folders, chosen)
        place = folder / hashlib.sha256(repr((folders, chosen)).encode()).hexdigest()
        try:
            return loads(place.read_bytes())
        except FileNotFoundError:
            tree = compose_here(folders, chosen)
        beside = place.with_suffix(f".{os.getpid()}")
        beside.write_bytes(dumps(tree))
        beside.replace(place)
        return tree

    compose._composed = composed  # pyright: ignore
