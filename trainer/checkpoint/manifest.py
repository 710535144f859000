"""The manifest of a checkpoint: one JSON file, written last, that locates every tensor.

    step_00000100/shard_00000.safetensors   the tensors (or parts of them) that one rank wrote
    step_00000100/manifest.json             sizes and SHA-256 of the files, offsets of the parts,
                                            and every value that is not a tensor

No pickle is involved: shards are raw numbers and the rest is JSON, so opening a stranger's
checkpoint runs none of its code. trainer/checkpoint/storage.py writes and reads the shards.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer.checkpoint.wholeness import DTYPES, check_manifest
from trainer.files.limited_reader import MANIFEST_BYTES, contents, json_value
from trainer.files.safe_files import LINKED

MANIFEST = "manifest.json"
LABELS = {dtype: label for label, dtype in DTYPES.items()}


def unravel(value: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Splits nested containers into tensors by path and a JSON tree of everything else.

    Args:
        value: nested dicts, lists and tuples of tensors and plain values.
        path: of `value` within the whole state, with "/" between keys.

    Returns:
        ({path: tensor}, tree), where {"$tensor": path} in the tree marks a tensor and
        {"$tuple": [...]} a tuple.

    Raises:
        ValueError: a value that is neither a tensor nor plain (None, bool, int, float, str), or a
            key that is not text.
    """
    if isinstance(value, Tensor):
        if value.dtype not in LABELS:
            raise ValueError(
                f"a checkpoint cannot hold {path} of {value.dtype}; convert it to one of"
                f" {sorted(DTYPES)}"
            )
        return {path: value}, {"$tensor": path}
    # An exact type, because a subclass (a numpy float, an enum) would not survive JSON.
    if value is None or type(value) in (bool, int, float, str):
        return {}, value
    if type(value) in (list, tuple):
        return _unravel_sequence(value, path)
    if not isinstance(value, dict):
        raise ValueError(
            f"a checkpoint holds tensors and plain values; {path} is a {type(value).__name__}"
        )
    return _unravel_dict(value, path)


def _unravel_sequence(value: Any, path: str) -> tuple[dict[str, Tensor], Any]:
    tensors: dict[str, Tensor] = {}
    items: list[Any] = []
    for index, item in enumerate(value):
        item_tensors, item_tree = unravel(item, f"{path}/{index}")
        tensors |= item_tensors
        items.append(item_tree)
    # JSON has lists only; the mark restores the type on reading.
    if type(value) is tuple:
        return tensors, {"$tuple": items}
    return tensors, items


def _unravel_dict(value: dict[Any, Any], path: str) -> tuple[dict[str, Tensor], Any]:
    tensors: dict[str, Tensor] = {}
    tree: dict[str, Any] = {}
    for key, item in value.items():
        # A leading $ would be read back as one of our own marks.
        if not isinstance(key, str) or key.startswith("$"):
            raise ValueError(
                f"a checkpoint's keys are texts without a leading $; {path or 'the state'} has"
                f" {key!r}"
            )
        item_path = f"{path}/{key}" if path else key
        item_tensors, tree[key] = unravel(item, item_path)
        # {"a/b": x} and {"a": {"b": y}} flatten to one path; the later would replace the earlier.
        clashes = tensors.keys() & item_tensors.keys()
        if clashes:
            raise ValueError(
                f"two tensors of the state share the path {min(clashes)}; rename a key that holds"
                " '/'"
            )
        tensors |= item_tensors
    return tensors, tree


def ravel(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Restores nested containers from a tree and tensors by path; the inverse of `unravel`."""
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
    """Computes the SHA-256 of a manifest without its own "sha256" entry."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    # Sorted and without spaces, so that the sum does not depend on who wrote the JSON.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(place: Path) -> dict[str, Any]:
    """Reads the manifest of the checkpoint directory `place` and checks it.

    It is checked against its own sum, against the sizes of the files and against itself; the
    contents of the shards are not read.

    Raises:
        ValueError: the checkpoint is not whole; the message says in which respect.
    """
    # A link could lead to files that another user changes between the check and the reading.
    if place.is_symlink():
        raise ValueError(LINKED)
    try:
        raw = contents(place / MANIFEST, MANIFEST_BYTES, follow=False)
        manifest = json_value(raw, f"its {MANIFEST}")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
        raise ValueError(f"its {MANIFEST} does not have the SHA-256 that was noted in it")
    check_manifest(place, manifest, MANIFEST)
    return manifest


def broken(place: Path, name: str, sha256: str) -> str | None:
    """Describes the damage of one file of a checkpoint, or returns None where its sum is right."""
    with open(place / name, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual == sha256:
        return None
    return f"{name} does not have the SHA-256 that was noted when it was written"


def sync(directory: Path) -> None:
    """Makes the names in a directory outlive a power cut."""
    # fsync of a file keeps its bytes; its name lies in the directory, which has an fsync of its
    # own.
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
