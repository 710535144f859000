"""Models by their names on the Hugging Face hub, and the links of its cache."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from trainer.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}(/[A-Za-z0-9][A-Za-z0-9_.-]{0,95})?")
# No code and no pickled weights: these are neither read nor fetched.
WANTED = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")


def local_folder(folder: Path) -> Path:
    """Returns a folder as it is, and of a name on the hub the folder of its newest revision.

    What the cache of the hub lacks is fetched; without a network (HF_HUB_OFFLINE=1) the revision
    that was fetched last is taken.

    Raises:
        UserError: there is no such folder, and no model of that name can be had.
    """
    # Unlike Path.is_dir, it takes a name that is too long for one that is not there.
    if os.path.isdir(folder):
        return folder
    name = str(folder)
    if not NAME.fullmatch(name):
        raise UserError(f"there is no folder {folder}; download the model and name its folder")
    try:
        return Path(snapshot_download(name, allow_patterns=list(WANTED)))
    # Of many kinds: no such name, no access, no network, a full disk.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"there is no folder {folder}, and no model of that name can be had from the Hugging"
            f" Face hub ({lines[0]}); download the model and name its folder"
        ) from error


def linked(path: Path) -> Path:
    """Returns the file that a link of the hub's cache stands for; any other path as it is.

    There snapshots/REVISION/NAME is a link to blobs/HASH beside it, and leads nowhere else.
    """
    snapshots = path.parent.parent
    if not path.is_symlink() or snapshots.name != "snapshots":
        return path
    blob = path.resolve()
    return blob if blob.parent == (snapshots.parent / "blobs").resolve() else path
