"""The manifest of a checkpoint: one JSON file, written last, that says what is whole and where
every tensor lies.

    step_00000100/shard_00000.safetensors   the tensors (or parts of tensors) that one rank wrote; see trainer/checkpoint/storage.py
    step_00000100/manifest.json             sizes and SHA-256 of the files, places of the parts, all that is no tensor

No pickle anywhere: raw numbers and JSON, so that opening a stranger's checkpoint runs none of its
code.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.wholeness import DTYPES, check_manifest
from trainer.limited_reader import MANIFEST_BYTES, contents, json_value
from trainer.safe_files import LINKED

MANIFEST = "manifest.json"
LABELS = {dtype: label for label, dtype in DTYPES.items()}


def unravel(value: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into {path: tensor} and a JSON tree that says where each
    tensor goes.

    Raises:
        ValueError: a value neither tensor nor plain (None, bool, int, float, str), or a key that is
            no text.
    """
    if isinstance(value, Tensor):
        if value.dtype not in LABELS:
            raise ValueError(
                f"a checkpoint cannot hold {path} of {value.dtype}; convert it to one of"
                f" {sorted(DTYPES)}"
            )
        return {path: value}, {"$tensor": path}
    if value is None or type(value) in (bool, int, float, str):
        return {}, value
    tensors: dict[str, Tensor] = {}
    if type(value) in (list, tuple):
        tree: Any = []
        for index, item in enumerate(value):
            found, below = unravel(item, f"{path}/{index}")
            tensors |= found
            tree.append(below)
        return tensors, {"$tuple": tree} if type(value) is tuple else tree
    if not isinstance(value, dict):
        raise ValueError(
            f"a checkpoint holds tensors and plain values; {path} is a {type(value).__name__}"
        )
    tree = {}
    for key, item in value.items():
        if not isinstance(key, str) or key.startswith("$"):
            raise ValueError(
                f"a checkpoint's keys are texts without a leading $; {path or 'the state'} has"
                f" {key!r}"
            )
        found, tree[key] = unravel(item, f"{path}/{key}" if path else key)
        if clash := tensors.keys() & found.keys():
            raise ValueError(
                f"two tensors of the state share the path {min(clash)}; rename a key that holds '/'"
            )
        tensors |= found
    return tensors, tree


def ravel(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `unravel`."""
    if isinstance(tree, list):
        return [ravel(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$tuple" in tree:
        return tuple(ravel(item, tensors) for item in tree["$tuple"])
    return {key: ravel(item, tensors) for key, item in tree.items()}


def digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own entry."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def read_manifest(place: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `place`, checked against its own sum, the sizes of the
    files and itself.

    Raises:
        ValueError: the checkpoint is not whole; the message says in what.
    """
    if place.is_symlink():
        raise ValueError(LINKED)
    try:
        manifest = json_value(
            contents(place / MANIFEST, MANIFEST_BYTES, follow=False), f"its {MANIFEST}"
        )
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
        raise ValueError(f"its {MANIFEST} does not have the SHA-256 that was noted in it")
    check_manifest(place, manifest, MANIFEST)
    return manifest


def broken(place: Path, name: str, sha256: str) -> str | None:
    """What is wrong with the contents of one file of a checkpoint, or None."""
    with open(place / name, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return (
        None
        if found == sha256
        else f"{name} does not have the SHA-256 that was noted when it was written"
    )


def sync(directory: Path) -> None:
    """Make the names in a directory outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
