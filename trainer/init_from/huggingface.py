"""Reads the folder of a Hugging Face model: its config.json, and its safetensors shard by shard."""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.hub.registry import adapter_of
from models.hub.tensors import TensorPiece
from trainer.errors import BAD_RUN, UserError
from trainer.files.limited_reader import MANIFEST_BYTES, Unreadable, json_object
from trainer.init_from.hub_cache import linked, local_folder
from trainer.init_from.weights import PICKLED, SafetensorsFile, WeightSource

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors")


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a folder, or of a name on the hub.

    Raises:
        UserError: there is no such folder or file, or it is no JSON object.
    """
    folder = local_folder(folder)
    try:
        return json_object(linked(folder / CONFIG), follow=False)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {CONFIG}; name the folder of a Hugging Face model"
        ) from None
    except (Unreadable, OSError) as error:
        raise UserError(f"{error}; get the file again", BAD_RUN) from error


class HuggingFaceWeights(WeightSource):
    """The tensors of a Hugging Face model by our names.

    Args:
        folder: with config.json and model.safetensors, or shards and their index; or a name on the
            hub.

    Raises:
        UserError: no adapter reads it, or a file is missing, pickled, cut off or a link.
    """

    def __init__(self, folder: Path):
        self.about = f"Hugging Face model {folder}"
        folder = local_folder(folder)
        content = read_config(folder)
        try:
            adapter = adapter_of(content)
            adapter.architecture(content)
            self.ties = adapter.ties(content)
            pieces = list(adapter.pieces(content))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{folder}: {refusal(error)}") from error
        found = dict(_tensors(folder))
        self.stored = _full_names(found, adapter.base_prefix)
        self.files = {name: found[stored] for name, stored in self.stored.items()}
        self.shapes = {}
        self.pieces: dict[str, tuple[TensorPiece, int]] = {}
        used: set[str] = set()
        for piece in pieces:
            if all(name in self.files for name in piece.theirs):
                self._add(piece)
                used.update(piece.theirs)
        for name in self.files:
            unused = adapter.is_unused(name, content)
            # a head that is tied is written by some programs all the same
            if name not in used and not unused and not (self.ties and name == "lm_head.weight"):
                self.shapes[name] = self.their_shape(name)

    def _add(self, piece: TensorPiece) -> None:
        """Notes the names and shapes of a piece, from tensors without values."""
        blank = [torch.empty(self.their_shape(name), device="meta") for name in piece.theirs]
        try:
            parts = piece.read(blank)
        except (RuntimeError, ValueError, IndexError) as error:
            shown = ", ".join(piece.theirs[:3])
            raise UserError(f"{shown} do not fit: {error}", BAD_RUN) from error
        for index, (name, part) in enumerate(zip(piece.ours, parts, strict=True)):
            self.pieces[name] = (piece, index)
            self.shapes[name] = part.shape

    def read(self, name: str) -> Tensor:
        """See WeightSource.read."""
        piece, index = self.pieces[name]
        return piece.read(_ReadWhenAsked(self, piece.theirs))[index]

    def read_theirs(self, name: str) -> Tensor:
        """Returns a tensor by the name that transformers gives it."""
        return self.files[name].read(self.stored[name])

    def their_shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor by the name that transformers gives it."""
        return self.files[name].shapes[self.stored[name]]


class _ReadWhenAsked(Sequence[Tensor]):
    """Tensors of a folder of which each is read when it is asked for, and not kept."""

    def __init__(self, weights: HuggingFaceWeights, names: Sequence[str]):
        self.weights = weights
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return self.weights.read_theirs(self.names[int(index)])


def _full_names(stored: Iterable[str], prefix: str) -> dict[str, str]:
    """Returns {name in transformers: name in the file}; a model without its head has shorter ones.

    Args:
        prefix: see Adapter.base_prefix.
    """
    names = list(stored)
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    return {prefix + name: name for name in names}


def refusal(error: Exception) -> str:
    """Returns an adapter's message; of a config.json of impossible types, what went wrong."""
    if isinstance(error, ValueError):
        return str(error)
    return f"{CONFIG} has a value of an impossible type ({type(error).__name__}: {error})"


def _tensors(folder: Path) -> Iterator[tuple[str, SafetensorsFile]]:
    """Yields every tensor of a folder with its file."""
    if (folder / INDEX).exists():
        yield from _indexed(folder)
        return
    if not (folder / SINGLE).exists():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise UserError(
                f"{folder} holds its weights as {pickled[0]}, and a pickled file can run code when"
                f" it is opened; get the folder with {SINGLE}"
            )
        raise UserError(f"{folder} holds neither {SINGLE} nor {INDEX}; get it again", BAD_RUN)
    file = SafetensorsFile(linked(folder / SINGLE))
    for name in file.shapes:
        yield name, file


def _indexed(folder: Path) -> Iterator[tuple[str, SafetensorsFile]]:
    try:
        names = json_object(linked(folder / INDEX), MANIFEST_BYTES, follow=False).get("weight_map")
    except (Unreadable, OSError) as error:
        raise UserError(f"{error}; get the file again", BAD_RUN) from error
    if not isinstance(names, dict):
        raise UserError(f"{folder / INDEX} has no weight_map; get the file again", BAD_RUN)
    files: dict[str, SafetensorsFile] = {}
    for name, shard in names.items():
        # A name such as ../x would lead out of the folder.
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise UserError(f"{folder / INDEX} names {shard!r}, which is no shard", BAD_RUN)
        if shard not in files:
            files[shard] = SafetensorsFile(linked(folder / shard))
        if name not in files[shard].shapes:
            raise UserError(f"{folder / shard} lacks {name}; get the file again", BAD_RUN)
        yield name, files[shard]
