"""What makes a manifest whole: every field has a type and a range, and the chunks of a tensor tile
it exactly.

All of it is checked before a byte of a shard is read, so that what a stranger or a broken disk
wrote is never taken for a checkpoint with some tensors missing.
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
STEPS = 2**53  # no run takes more steps; a float still holds the number exactly
LARGEST = 2**62  # of a number of bytes or elements: the product of no two sizes may overflow
MAX_DIMS = 12  # a corner of a chunk is one of 2 ** dims

Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Box = Annotated[list[Natural], Field(max_length=MAX_DIMS)]


class Sheet(BaseModel):
    """A record of a manifest: no value is converted, and an unknown key is an error."""

    model_config = ConfigDict(strict=True, extra="forbid")


class FileRecord(Sheet):
    """A shard as it was written."""

    bytes: Natural
    sha256: str


class Chunk(Sheet):
    """A box of a tensor, and where in which file its elements lie."""

    offsets: Box
    sizes: Box
    file: str
    start: int
    bytes: Natural


class TensorRecord(Sheet):
    """A tensor and the boxes that it was cut into."""

    dtype: str
    size: Box
    chunks: list[Chunk]


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
    """The folder of a step holds that step: what is sorted, kept and deleted goes by the folder's
    name."""
    match = FOLDER.fullmatch(place.name)
    if match and int(match[1]) != step:
        raise ValueError(f"it lies in {place.name} and says that it is of step {step}")


def _check_files(place: Path, manifest: Manifest, name: str) -> None:
    for file, record in manifest.files.items():
        if not SHARD.fullmatch(file):
            raise ValueError(f"its {name} names a file {file!r} that is no shard")
        if not DIGEST.fullmatch(record.sha256):
            raise ValueError(f"its {name} has no SHA-256 of {file}")
        try:
            status = (place / file).lstat()
        except FileNotFoundError:
            raise ValueError(f"{file} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{file} is no regular file")
        if status.st_size != record.bytes:
            raise ValueError(f"{file} should have {record.bytes} bytes and has {status.st_size}")


def _check_tensor(path: str, tensor: TensorRecord, manifest: Manifest, name: str) -> None:
    """The type is known, every chunk lies within its file and its tensor, and together they are the
    tensor."""
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
        if any(o + s > size for o, s, size in zip(chunk.offsets, chunk.sizes, tensor.size)):
            raise ValueError(f"its {name} has a chunk of {path} beyond its size {tensor.size}")
        if chunk.file not in manifest.files:
            raise ValueError(f"its {name} places {path} outside of its files, in {chunk.file!r}")
        fits = 0 <= chunk.start <= chunk.start + chunk.bytes <= manifest.files[chunk.file].bytes
        if chunk.bytes != math.prod(chunk.sizes) * itemsize or chunk.start % itemsize or not fits:
            raise ValueError(
                f"its {name} places {path} outside of {chunk.file}, or with another number of bytes"
            )
    if not tiles(tensor.size, [(chunk.offsets, chunk.sizes) for chunk in tensor.chunks]):
        raise ValueError(f"its {name} has chunks of {path} that overlap or do not cover it")


def tiles(size: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether boxes (offsets, sizes) cover a tensor of `size` exactly once.

    A box is known by its corners with signs: the sum of the boxes' indicator functions is that of
    the whole exactly if the signed corners add up to those of the whole. That takes time linear in
    the number of boxes; empty boxes cancel out.
    """
    corners: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in boxes:
        for corner, sign in _corners(offsets, sizes):
            corners[corner] += sign
    for corner, sign in _corners([0] * len(size), size):
        corners[corner] -= sign
    return not any(corners.values())


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    """The 2 ** dims corners of a box, each with the sign of its share in the mixed difference."""
    for choice in itertools.product((0, 1), repeat=len(sizes)):
        yield tuple(o + s * far for o, s, far in zip(offsets, sizes, choice)), (-1) ** sum(choice)


def _check_regions(manifest: Manifest, name: str) -> None:
    """No byte of a file belongs to two chunks."""
    regions: dict[str, list[tuple[int, int, str]]] = {}
    for path, tensor in manifest.tensors.items():
        for chunk in tensor.chunks:
            if chunk.bytes:
                regions.setdefault(chunk.file, []).append(
                    (chunk.start, chunk.start + chunk.bytes, path)
                )
    for file, taken in regions.items():
        for (_, end, one), (start, _, other) in itertools.pairwise(sorted(taken)):
            if start < end:
                raise ValueError(
                    f"its {name} gives the same bytes of {file} to {one} and to {other}"
                )


def _check_tree(manifest: Manifest, name: str) -> None:
    """Every tensor stands in the state exactly once, at the place that its path says."""
    standing: set[str] = set()
    waiting: list[tuple[str, Any]] = list(manifest.state.items())
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict) and "$tensor" in value:
            if value != {"$tensor": path} or path not in manifest.tensors or path in standing:
                raise ValueError(f"its {name} has no tensor, or another one, for {path}")
            standing.add(path)
            continue
        if isinstance(value, dict) and "$tuple" in value:
            value = value["$tuple"] if list(value) == ["$tuple"] else None
            if not isinstance(value, list):
                raise ValueError(f"its {name} has an entry of a wrong kind at {path}")
        if isinstance(value, dict):
            if any(key.startswith("$") for key in value):
                raise ValueError(f"its {name} has an entry of a wrong kind at {path}")
            waiting += [(f"{path}/{key}", below) for key, below in value.items()]
        elif isinstance(value, list):
            waiting += [(f"{path}/{index}", below) for index, below in enumerate(value)]
    if homeless := manifest.tensors.keys() - standing:
        raise ValueError(
            f"its {name} has a tensor {min(homeless)} that stands nowhere in the state"
        )
