"""The manifest of a checkpoint: one JSON file, written last, that says what is whole and where every tensor lies.

    step_00000100/shard_00000.safetensors   the tensors (or parts of tensors) that one rank wrote; see trainer/shards.py
    step_00000100/manifest.json             sizes and SHA-256 of the files, places of the parts, all that is no tensor

No pickle anywhere: raw numbers and JSON, so that opening a stranger's checkpoint runs none of its code.
"""

import hashlib
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.reading import MANIFEST_BYTES, contents, json_value

MANIFEST = "manifest.json"
VERSION = 1
SHARD = re.compile(r"shard_\d{5,}\.safetensors")
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LABELS = {dtype: label for label, dtype in DTYPES.items()}


def unravel(value: Any, path: str = "") -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into {path: tensor} and a JSON tree that says where each tensor goes.

    Raises:
        ValueError: a value neither tensor nor plain (None, bool, int, float, str), or a key that is no text.
    """
    if isinstance(value, Tensor):
        if value.dtype not in LABELS:
            raise ValueError(f"a checkpoint cannot hold {path} of {value.dtype}; convert it to one of {sorted(DTYPES)}")
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
        raise ValueError(f"a checkpoint holds tensors and plain values; {path} is a {type(value).__name__}")
    tree = {}
    for key, item in value.items():
        if not isinstance(key, str) or key.startswith("$"):
            raise ValueError(f"a checkpoint's keys are texts without a leading $; {path or 'the state'} has {key!r}")
        found, tree[key] = unravel(item, f"{path}/{key}" if path else key)
        if clash := tensors.keys() & found.keys():
            raise ValueError(f"two tensors of the state share the path {min(clash)}; rename a key that holds '/'")
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
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(place: Path) -> dict[str, Any]:
    """The manifest of the checkpoint in `place`, checked against its own sum and the sizes of the files.

    Raises:
        ValueError: the checkpoint is not whole; the message says in what.
    """
    try:
        manifest = json_value(contents(place / MANIFEST, MANIFEST_BYTES), f"its {MANIFEST}")
    except FileNotFoundError:
        raise ValueError(f"it has no {MANIFEST}, which is written last") from None
    if not isinstance(manifest, dict) or manifest.get("sha256") != digest(manifest):
        raise ValueError(f"its {MANIFEST} does not have the SHA-256 that was noted in it")
    try:
        _check(place, manifest)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} lacks an entry or has one of a wrong kind ({error!r})") from None
    return manifest


def _check(place: Path, manifest: dict[str, Any]) -> None:
    if manifest["version"] != VERSION:
        raise ValueError(f"it has format {manifest['version']}; this program reads format {VERSION}")
    for name, file in manifest["files"].items():
        if not SHARD.fullmatch(name):
            raise ValueError(f"its {MANIFEST} names a file {name!r} that is no shard")
        if not (place / name).is_file():
            raise ValueError(f"{name} is missing")
        if (size := (place / name).stat().st_size) != file["bytes"]:
            raise ValueError(f"{name} should have {file['bytes']} bytes and has {size}")
    for path, tensor in manifest["tensors"].items():
        for chunk in tensor["chunks"]:
            wanted = math.prod(chunk["sizes"]) * DTYPES[tensor["dtype"]].itemsize
            end = chunk["start"] + wanted
            if chunk["bytes"] != wanted or not 0 <= chunk["start"] <= end <= manifest["files"][chunk["file"]]["bytes"]:
                raise ValueError(f"its {MANIFEST} places {path} outside of {chunk['file']}")


def broken(place: Path, name: str, sha256: str) -> str | None:
    """What is wrong with the contents of one file of a checkpoint, or None."""
    with open(place / name, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"{name} does not have the SHA-256 that was noted when it was written"


def sync(directory: Path) -> None:
    """Make the names in a directory outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
