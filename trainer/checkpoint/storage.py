"""How a checkpoint reaches the disk: a writer and a reader of safetensors files for
`torch.distributed.checkpoint`.

Planning, resharding and the exchange of failures between ranks are torch's. Its own file format
holds pickles (`.metadata`, and `torch.save` streams); ours holds raw numbers, one safetensors file
a rank that any safetensors reader opens, and the JSON of trainer/checkpoint/manifest.py.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoint.manifest import LABELS, MANIFEST, digest, sync
from trainer.checkpoint.throttle import SLICE, Throttle
from trainer.checkpoint.wholeness import DTYPES, VERSION

SYNC = 8 << 20  # bytes after which a writer that takes its time hands them to the disk
# of the first tensor; the others follow in order of falling item size, so each is aligned to its
# own
ALIGNMENT = 64


class ShardSlice(NamedTuple):
    """Where a rank put one box of one tensor, and what its whole file came to."""

    file: str
    start: int
    bytes: int
    file_bytes: int
    file_sha256: str


def _label(item: WriteItem) -> str:
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    whole = chunk.sizes == item.tensor_data.size
    return item.index.fqn if whole else f"{item.index.fqn}@{','.join(map(str, chunk.offsets))}"


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


class ShardWriter(StorageWriter):
    """Writes one safetensors file a rank, hashed as it is written; rank 0 adds the manifest and
    calls `publish`.

    Args:
        place: a directory that does not exist yet; the same on all ranks, on a file system that all
            of them see.
        head: what goes into the manifest besides tensors (JSON).
        publish: called on rank 0 alone after every file is on the disk.
        pace: of the thread that writes.

    All methods run inside `torch.distributed.checkpoint`, which shows an error of any rank to all
    of them.
    """

    def __init__(
        self, place: Path, head: dict[str, Any], publish: Callable[[], None], pace: Throttle
    ):
        self.place = place
        self.head = head
        self.publish = publish
        self.pace = pace

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between two checkpoints: each has a writer of its own."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:
            self.place.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            replace(plan, storage_data=f"shard_{rank:05d}.safetensors")
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan.storage_data, plan.items, planner) if plan.items else [])
        return done

    def _write(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        items = sorted(items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # type: ignore[union-attr]
        header = {}
        begin = 0
        for item in items:
            assert item.tensor_data is not None
            header[_label(item)] = {
                "dtype": LABELS[item.tensor_data.properties.dtype],
                "shape": list(item.tensor_data.chunk.sizes),
                "data_offsets": [begin, begin + _bytes(item)],
            }
            begin += _bytes(item)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % ALIGNMENT)
        sha = hashlib.sha256()
        written = 0
        self.pace.begin()
        with open(self.place / name, "xb", buffering=0) as file:
            for block in itertools.chain(
                (len(text).to_bytes(8, "little"), text), self._raw(items, planner)
            ):
                for first in range(0, len(block), SLICE):
                    view = memoryview(block)[first : first + SLICE]
                    sha.update(view)
                    written += len(view)
                    while len(view):  # an unbuffered file may take less than it is given
                        view = view[file.write(view) :]
                    if (
                        self.pace.ratio and written >= SYNC
                    ):  # the disk is given its part little by little too
                        os.fdatasync(file.fileno())
                        written = 0
                    self.pace.rest()
            os.fsync(file.fileno())
        data = 8 + len(text)
        result = []
        total = data + begin
        for item in items:
            part = ShardSlice(name, data, _bytes(item), total, sha.hexdigest())
            result.append(WriteResult(item.index, part.bytes, part))
            data += part.bytes
        return result

    @staticmethod
    def _raw(items: list[WriteItem], planner: SavePlanner) -> Iterator[memoryview]:
        """The bytes of each tensor, one at a time, so that at most one copy is on its way from the
        device."""
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[fqn] = {
                "dtype": LABELS[entry.properties.dtype],
                "size": list(entry.size),
                "chunks": [],
            }
        sizes = {
            (fqn, tuple(chunk.offsets)): list(chunk.sizes)
            for fqn, entry in metadata.state_dict_metadata.items()
            for chunk in entry.chunks  # type: ignore[union-attr]
        }
        files = {}
        for result in (one for rank in results for one in rank):
            part = result.storage_data
            offsets = list(result.index.offset or ())
            chunk: dict[str, Any] = {
                "offsets": offsets,
                "sizes": sizes[result.index.fqn, tuple(offsets)],
            }
            chunk |= {"file": part.file, "start": part.start, "bytes": part.bytes}
            tensors[result.index.fqn]["chunks"].append(chunk)
            files[part.file] = {"bytes": part.file_bytes, "sha256": part.file_sha256}
        for name, file in files.items():
            if (
                not (self.place / name).is_file()
                or (self.place / name).stat().st_size != file["bytes"]
            ):
                raise FileNotFoundError(
                    f"rank 0 does not see {name}: run_dir must lie on a disk that all ranks share"
                )
        manifest = {"version": VERSION, **self.head, "files": files, "tensors": tensors}
        manifest["sha256"] = digest(manifest)
        with open(self.place / MANIFEST, "x", encoding="utf-8") as file:
            json.dump(manifest, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        sync(self.place)
        self.publish()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True


class ShardReader(StorageReader):
    """Reads those boxes of a checkpoint that the plan asks for; files are mapped, not read
    whole."""

    def __init__(self, place: Path, manifest: dict[str, Any]):
        self.place = place
        self.manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Nothing is kept between two checkpoints: each has a reader of its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                fqn: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor["dtype"]]),
                    torch.Size(tensor["size"]),
                    [
                        ChunkStorageMetadata(torch.Size(c["offsets"]), torch.Size(c["sizes"]))
                        for c in tensor["chunks"]
                    ],
                )
                for fqn, tensor in self.manifest["tensors"].items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """The manifest already says where everything lies."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        files: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = self.manifest["tensors"][item.storage_index.fqn]
            offsets = list(item.storage_index.offset or ())
            chunk = next(
                c for c in tensor["chunks"] if c["offsets"] == offsets and 0 not in c["sizes"]
            )
            if chunk["file"] not in files:
                size = self.manifest["files"][chunk["file"]]["bytes"]
                files[chunk["file"]] = torch.from_file(
                    str(self.place / chunk["file"]), False, size, dtype=torch.uint8
                )
            raw = files[chunk["file"]][chunk["start"] : chunk["start"] + chunk["bytes"]]
            source = raw.view(DTYPES[tensor["dtype"]]).view(chunk["sizes"])
            for dim, (offset, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                source = source.narrow(dim, offset, length)
            target = planner.resolve_tensor(item)
            target.detach().copy_(source)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        return True
