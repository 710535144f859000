"""The Arrow files in which `datasets` keeps a data set that it has fetched and prepared."""

import os
import re
from typing import Any

from datasets import load_dataset

from trainer.data.sources.hub import cache_folder

SPLIT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def check_name(name: Any, subset: Any, split: Any, revision: Any) -> None:
    """Checks the settings that name a data set.

    Raises:
        ValueError: one is no name. A slice of a split is none: its rows are no files of their own.
    """
    for key, value in {"name": name, "subset": subset, "revision": revision}.items():
        wanted = isinstance(value, str) and value
        if not wanted and (key == "name" or value is not None):
            raise ValueError(
                f"data.{key}={value!r} is no name; give the name of a data set's {key}"
            )
    if not isinstance(split, str) or not SPLIT.fullmatch(split):
        raise ValueError(f"data.split={split!r} is no split; give a whole one, such as train")


def prepared_files(name: str, subset: str | None, split: str, revision: str | None) -> list[str]:
    """Returns the files of a split, in the order of its rows.

    The library fetches and prepares a data set that is not in its cache; without a network
    (HF_HUB_OFFLINE=1) it takes what the cache holds. It runs no code of a repository.

    Args:
        name: on the hub, or a local folder.
        subset, revision: None = the only one, and the newest.

    Raises:
        ValueError: it cannot be had.
    """
    place = os.path.expanduser(name)
    place = place if os.path.isdir(place) else name
    try:
        rows = load_dataset(place, subset, split=split, revision=revision, cache_dir=cache_folder())
    # Of many kinds: no such name, no access, no network, a bad split, a spoilt file.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"data.name={name} (subset {subset}, split {split}) cannot be had as a data set:"
            f" {lines[0]}; check the name, data.subset and data.split, or the network; or name a"
            " folder that save_to_disk wrote as data.path"
        ) from error
    paths = [str(entry["filename"]) for entry in rows.cache_files]
    if not paths:
        raise ValueError(
            f"data.name={name} (subset {subset}, split {split}) has no rows; name another"
        )
    return paths
