"""Checks that a manifest is whole: types and ranges of all fields, and chunks that tile tensors.

Everything is checked before a byte of a shard is read, so that a file from a stranger or a broken
disk is never taken for a checkpoint with some tensors missing.
"""

import itertools
import math
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

VERSION = 1
SHARD = re.compile(r"shard_\d{5,}\.safetensors")
DIGEST = re.compile(r"[0-9a-f]{64}")
FOLDER = re.compile(r"step_(\d{8,})")
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
STEPS = 2**53  # more than any run takes; a float still holds the number exactly
LARGEST = 2**62  # bytes or elements; torch's int64 products must not overflow
MAX_DIMS = 12  # `tiles` visits the 2**dims corners of every chunk

StoredSize = Annotated[int, Field(ge=0, le=LARGEST)]
Box = Annotated[list[StoredSize], Field(max_length=MAX_DIMS)]


class Sheet(BaseModel):
    """Base of the records of a manifest: values are not converted, unknown keys are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class FileRecord(Sheet):
    """Size and SHA-256 of a shard."""

    bytes: StoredSize
    sha256: str


class StoredBox(Sheet):
    """A box of a tensor, and the file and byte offset at which its elements lie."""

    offsets: Box
    sizes: Box
    file: str
    start: int
    bytes: StoredSize


class TensorRecord(Sheet):
    """A tensor and the boxes that it was cut into."""

    dtype: str
    size: Box
    chunks: list[StoredBox]


class Manifest(Sheet):
    """All entries of a manifest."""

    version: int
    step: Annotated[int, Field(ge=0, le=STEPS)]
    state: dict[str, Any]
    extra: dict[str, Any]
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]
    sha256: str


def check_manifest(place: Path, content: dict[str, Any], name: str) -> None:
    """Check a manifest called `name` against itself and the files of its folder.

    Raises:
        ValueError: the checkpoint is not whole; the message says in which respect.
    """
    if content.get("version") != VERSION:
        raise ValueError(
            f"it has format {str(content.get('version'))[:40]}; this program reads format {VERSION}"
        )
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:200]
        raise ValueError(
            f"its {name} lacks an entry or has one of a wrong kind ({where}: {first['msg']})"
        ) from None
    _check_step(place, manifest.step)
    _check_files(place, manifest, name)
    for path, tensor in manifest.tensors.items():
        _check_tensor(path, tensor, manifest, name)
    _check_regions(manifest, name)
    _check_tree(manifest, name)


def _check_step(place: Path, step: int) -> None:
    """Checks that the name of the folder is that of the step."""
    # Sorting, keeping and deleting go by the folder's name, resuming by the manifest's step.
    match = FOLDER.fullmatch(place.name)
    if match and int(match[1]) != step:
        raise ValueError(f"it lies in {place.name} and says that it is of step {step}")


def _check_files(place: Path, manifest: Manifest, name: str) -> None:
    """Checks names, sums and sizes of the shards; their contents are hashed elsewhere."""
    for file, record in manifest.files.items():
        # A name such as ../x would lead out of the checkpoint.
        if not SHARD.fullmatch(file):
            raise ValueError(f"its {name} names a file {file!r} that is no shard")
        if not DIGEST.fullmatch(record.sha256):
            raise ValueError(f"its {name} has no SHA-256 of {file}")
        # lstat, because a link could lead to a file that changes after this check.
        try:
            status = (place / file).lstat()
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file} is no regular file")
        if status.st_size != record.bytes:
            raise ValueError(f"{file} should have {record.bytes} bytes and has {status.st_size}")


def _check_tensor(path: str, tensor: TensorRecord, manifest: Manifest, name: str) -> None:
    """Checks the type of a tensor, and that its chunks lie in their files and make it up."""
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"its {name} lacks an entry or has one of a wrong kind ({path} is of type"
            f" {tensor.dtype!r})"
        )
    if math.prod(max(size, 1) for size in tensor.size) > LARGEST:
        raise ValueError(f"its {name} gives {path} the size {tensor.size}, which no machine has")
    itemsize = DTYPES[tensor.dtype].itemsize
    for chunk in tensor.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.size):
            raise ValueError(f"its {name} has a chunk of {path} with another number of dimensions")
        for offset, chunk_size, size in zip(chunk.offsets, chunk.sizes, tensor.size):
            if offset + chunk_size > size:
                raise ValueError(f"its {name} has a chunk of {path} beyond its size {tensor.size}")
        if chunk.file not in manifest.files:
            raise ValueError(f"its {name} places {path} outside of its files, in {chunk.file!r}")
        file_bytes = manifest.files[chunk.file].bytes
        fits = 0 <= chunk.start <= chunk.start + chunk.bytes <= file_bytes
        right_size = chunk.bytes == math.prod(chunk.sizes) * itemsize
        # The reader views the mapped bytes as the dtype, for which they must be aligned.
        aligned = chunk.start % itemsize == 0
        if not (right_size and aligned and fits):
            raise ValueError(
                f"its {name} places {path} outside of {chunk.file}, or with another number of bytes"
            )
    if not tiles(tensor.size, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]):
        raise ValueError(f"its {name} has chunks of {path} that overlap or do not cover it")


def tiles(size: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Tells if boxes cover a tensor exactly once, in time linear in the number of boxes.

    A box is determined by its signed corners: the indicator functions of the boxes add up to that
    of the whole tensor exactly if the signed corners add up to those of the whole. Empty boxes
    cancel out.

    Args:
        size: of the tensor.
        boxes: (offsets, sizes) of each.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        for corner, sign in _corners(offsets, sizes):
            corners[corner] += sign
    for corner, sign in _corners([0] * len(size), size):
        corners[corner] -= sign
    return not any(corners.values())


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields the 2**dims corners of a box, each with its sign in the mixed difference."""
    for far_ends in itertools.product((0, 1), repeat=len(sizes)):
        corner: list[int] = []
        for offset, size, far_end in zip(offsets, sizes, far_ends):
            corner.append(offset + size * far_end)
        yield tuple(corner), (-1) ** sum(far_ends)


def _check_regions(manifest: Manifest, name: str) -> None:
    """Checks that no byte of a file belongs to two chunks."""
    regions: dict[str, list[tuple[int, int, str]]] = {}
    for path, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            # An empty chunk has no bytes to share, wherever it starts.
            if chunk.bytes:
                region = (chunk.start, chunk.start + chunk.bytes, path)
                regions.setdefault(chunk.file, []).append(region)
    for file, file_regions in regions.items():
        # Sorted by start, so regions overlap exactly if two neighbours do.
        for left, right in itertools.pairwise(sorted(file_regions)):
            if right[0] < left[1]:
                raise ValueError(
                    f"its {name} gives the same bytes of {file} to {left[2]} and to {right[2]}"
                )


def _check_tree(manifest: Manifest, name: str) -> None:
    """Checks that every tensor occurs in the state exactly once, where its path says."""
    visited: set[str] = set()
    # A stack of our own: a deeply nested manifest must not exhaust Python's.
    waiting: list[tuple[str, Any]] = list(manifest.state.items())
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and "$tensor" in value:
            if value != {"$tensor": path} or path not in manifest.tensors or path in visited:
                raise ValueError(f"its {name} has no tensor, or another one, for {path}")
            visited.add(path)
            continue
        if isinstance(value, dict) and "$tuple" in value:
            value = value["$tuple"] if list(value) == ["$tuple"] else None
            if not isinstance(value, list):
                raise ValueError(f"its {name} has an entry of a wrong kind at {path}")
        if isinstance(value, dict):
            if any(key.startswith("$") for key in value):
                raise ValueError(f"its {name} has an entry of a wrong kind at {path}")
            for key, item in value.items():
                waiting.append((f"{path}/{key}", item))
        elif isinstance(value, list):
            for index, item in enumerate(value):
                waiting.append((f"{path}/{index}", item))
    unvisited = manifest.tensors.keys() - visited
    if unvisited:
        raise ValueError(
            f"its {name} has a tensor {min(unvisited)} that stands nowhere in the state"
        )
