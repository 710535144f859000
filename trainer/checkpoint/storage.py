"""Writer and reader of safetensors files for `torch.distributed.checkpoint`.

Planning, resharding and the exchange of failures between ranks are torch's. Torch's own file format
holds pickles (`.metadata`, and `torch.save` streams); ours holds raw numbers, one safetensors file
per rank that any safetensors reader opens, and the JSON of trainer/checkpoint/manifest.py.
"""

import hashlib
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

SYNC = 8 << 20  # bytes between two fdatasync of a throttled writer
# Bytes to which the first tensor is aligned. The others follow in order of falling item size, so
# each is aligned to its own item size.
ALIGNMENT = 64
LENGTH_BYTES = 8  # a safetensors file begins with the length of its header


class ShardSlice(NamedTuple):
    """Location of one box of one tensor, with the size and the sum of the file that holds it.

    Attributes:
        file: name of the shard.
        start: offset of the box in it, in bytes.
        bytes: of the box.
        file_bytes: of the whole file.
        file_sha256: of the whole file.
    """

    file: str
    start: int
    bytes: int
    file_bytes: int
    file_sha256: str


def _label(item: WriteItem) -> str:
    """Names an item in its shard: the tensor's path, with @offsets where it is only a part."""
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    if chunk.sizes == item.tensor_data.size:
        return item.index.fqn
    offsets = ",".join(map(str, chunk.offsets))
    return f"{item.index.fqn}@{offsets}"


def _item_bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _header(items: list[WriteItem]) -> bytes:
    """Builds the JSON header of a shard, padded so that the data after it is aligned."""
    entries = {}
    begin = 0
    for item in items:
        assert item.tensor_data is not None
        end = begin + _item_bytes(item)
        entries[_label(item)] = {
            "dtype": LABELS[item.tensor_data.properties.dtype],
            "shape": list(item.tensor_data.chunk.sizes),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-(len(text) + LENGTH_BYTES) % ALIGNMENT)


class ShardWriter(StorageWriter):
    """Writes one safetensors file per rank, hashed while it is written; rank 0 adds the manifest.

    All methods run inside `torch.distributed.checkpoint`, which shows an error of any rank to all
    of them.

    Args:
        place: a directory that does not exist yet; the same on all ranks, on a file system that all
            of them see.
        head: JSON for the manifest besides tensors.
        publish: called on rank 0 alone after every file is on the disk.
        pace: limits the processor time of the thread that writes.
    """

    def __init__(
        self, place: Path, head: dict[str, Any], publish: Callable[[], None], pace: Throttle
    ):
        self.place = place
        self.head = head
        self.publish = publish
        self.pace = pace

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Does nothing: every checkpoint has a writer of its own."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Makes the directory, on rank 0."""
        if is_coordinator:
            self.place.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Returns the rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Gives each rank the name of its file."""
        named_plans = []
        for rank, plan in enumerate(plans):
            named_plans.append(replace(plan, storage_data=f"shard_{rank:05d}.safetensors"))
        return named_plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file, unless the rank has nothing to write."""
        results: list[WriteResult] = []
        if plan.items:
            results = self._write(plan.storage_data, plan.items, planner)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        """Writes the items as the shard `name`, and returns where each of them lies."""
        # Falling item size keeps every tensor aligned without padding; the sort is stable.
        items = sorted(items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)  # type: ignore[union-attr]
        header = _header(items)
        sha = hashlib.sha256()
        self.pace.begin()
        # "x": a file of that name would belong to another run that writes at the same time.
        with open(self.place / name, "xb", buffering=0) as file:
            unsynced = 0
            for block in self._blocks(header, items, planner):
                for first in range(0, len(block), SLICE):
                    view = memoryview(block)[first : first + SLICE]
                    sha.update(view)
                    unsynced += len(view)
                    # An unbuffered file may take less than it is given.
                    while len(view):
                        view = view[file.write(view) :]
                    # Without this the last fsync would hand all of it to the disk at once, and
                    # training would wait for it.
                    if self.pace.ratio and unsynced >= SYNC:
                        os.fdatasync(file.fileno())
                        unsynced = 0
                    self.pace.rest()
            os.fsync(file.fileno())
        start = LENGTH_BYTES + len(header)
        total = start + sum(_item_bytes(item) for item in items)
        results = []
        for item in items:
            shard_slice = ShardSlice(name, start, _item_bytes(item), total, sha.hexdigest())
            results.append(WriteResult(item.index, shard_slice.bytes, shard_slice))
            start += shard_slice.bytes
        return results

    @staticmethod
    def _blocks(
        header: bytes, items: list[WriteItem], planner: SavePlanner
    ) -> Iterator[bytes | memoryview]:
        """Yields the contents of a shard: length, header, and the bytes of one tensor at a time."""
        yield len(header).to_bytes(LENGTH_BYTES, "little")
        yield header
        # A generator, so that at most one tensor's copy from the device is in memory.
        for item in items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor)
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes the manifest and publishes the checkpoint; called on rank 0 alone.

        Raises:
            FileNotFoundError: a shard of another rank is not visible.
        """
        tensors: dict[str, Any] = {}
        sizes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for fqn, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[fqn] = {
                "dtype": LABELS[entry.properties.dtype],
                "size": list(entry.size),
                "chunks": [],
            }
            for chunk in entry.chunks:
                sizes[fqn, tuple(chunk.offsets)] = list(chunk.sizes)
        files: dict[str, dict[str, Any]] = {}
        for rank_results in results:
            for result in rank_results:
                shard_slice = result.storage_data
                offsets = list(result.index.offset or ())
                tensors[result.index.fqn]["chunks"].append(
                    {
                        "offsets": offsets,
                        "sizes": sizes[result.index.fqn, tuple(offsets)],
                        "file": shard_slice.file,
                        "start": shard_slice.start,
                        "bytes": shard_slice.bytes,
                    }
                )
                files[shard_slice.file] = {
                    "bytes": shard_slice.file_bytes,
                    "sha256": shard_slice.file_sha256,
                }
        self._check_visible(files)
        manifest = {"version": VERSION, **self.head, "files": files, "tensors": tensors}
        manifest["sha256"] = digest(manifest)
        with open(self.place / MANIFEST, "x", encoding="utf-8") as file:
            json.dump(manifest, file, separators=(",", ":"))
            file.flush()
            os.fsync(file.fileno())
        sync(self.place)
        self.publish()

    def _check_visible(self, files: dict[str, dict[str, Any]]) -> None:
        """Checks that rank 0 sees every shard, which fails where each node has its own disk."""
        for name, record in files.items():
            path = self.place / name
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                raise FileNotFoundError(
                    f"rank 0 does not see {name}: run_dir must lie on a disk that all ranks share"
                )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike) -> bool:
        """Accepts every identifier: none is used."""
        return True


class ShardReader(StorageReader):
    """Reads the boxes of a checkpoint that a plan asks for; files are mapped, not read whole.

    Args:
        place: the directory of the checkpoint.
        manifest: its manifest, checked already.
    """

    def __init__(self, place: Path, manifest: dict[str, Any]):
        self.place = place
        self.manifest = manifest

    def reset(self, checkpoint_id: str | os.PathLike | None = None) -> None:
        """Does nothing: every checkpoint has a reader of its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Translates the manifest into torch's description of a checkpoint."""
        entries: dict[str, Any] = {}
        for fqn, tensor in self.manifest["tensors"].items():
            chunks = []
            for chunk in tensor["chunks"]:
                offsets = torch.Size(chunk["offsets"])
                chunks.append(ChunkStorageMetadata(offsets, torch.Size(chunk["sizes"])))
            properties = TensorProperties(dtype=DTYPES[tensor["dtype"]])
            size = torch.Size(tensor["size"])
            entries[fqn] = TensorStorageMetadata(properties, size, chunks)
        return Metadata(entries)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Does nothing: the manifest already locates everything."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Returns the rank's plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Returns the ranks' plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copies every box of the plan from the mapped files into the caller's tensors."""
        files: dict[str, Tensor] = {}
        for item in plan.items:
            tensor = self.manifest["tensors"][item.storage_index.fqn]
            chunk = _chunk_at(tensor["chunks"], list(item.storage_index.offset or ()))
            name = chunk["file"]
            if name not in files:
                size = self.manifest["files"][name]["bytes"]
                path = str(self.place / name)
                files[name] = torch.from_file(path, False, size, dtype=torch.uint8)
            raw = files[name][chunk["start"] : chunk["start"] + chunk["bytes"]]
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
        """Accepts every identifier: none is used."""
        return True


def _chunk_at(chunks: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
    """Returns the chunk that begins at `offsets`."""
    for chunk in chunks:
        # An empty chunk may begin where a full one does.
        if chunk["offsets"] == offsets and 0 not in chunk["sizes"]:
            return chunk
    raise LookupError(f"the plan asks for a chunk at {offsets}, which the manifest lacks")
