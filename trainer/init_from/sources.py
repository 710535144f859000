"""Reads the weights of a finished model tensor by tensor, wherever they lie.

    init_from=RUN            the newest whole checkpoint of a run directory
    init_from=CHECKPOINT     RUN/checkpoints/step_N
    init_from=EXPORT         a folder that scripts.export wrote
    init_from=hf:FOLDER      a Hugging Face model (trainer/init_from/huggingface.py)

Only safetensors and the shards of our own checkpoints are opened: no pickle, no links, no code.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from trainer import run_dir
from trainer.checkpoint.manifest import MANIFEST, read_manifest
from trainer.checkpoint.reader import CheckpointReader
from trainer.checkpoint.wholeness import DTYPES
from trainer.errors import BAD_RUN, UserError
from trainer.init_from.huggingface import HuggingFaceWeights
from trainer.init_from.weights import CONFIG, PICKLED, WEIGHTS, SafetensorsFile, WeightSource

HUGGINGFACE = "hf:"
KINDS = (
    "name a run directory, RUN/checkpoints/step_N, a folder that scripts.export wrote, or"
    " hf:FOLDER with the folder of a Hugging Face model"
)


class CheckpointWeights(WeightSource):
    """The model in a checkpoint, whatever ranks wrote it; its other parts stay on the disk.

    Args:
        place: a folder step_N whose files have been compared with their sums.
    """

    def __init__(self, place: Path):
        self.place = place
        self.about = f"checkpoint {place}"
        self.ties = {}
        self.manifest = read_manifest(place)
        tree = self.manifest["state"].get("model")
        if not isinstance(tree, dict):
            raise UserError(f"{place} holds no model; {KINDS}", BAD_RUN)
        self.paths: dict[str, str] = {}
        self.shapes = {}
        for name, leaf in tree.items():
            if not isinstance(leaf, dict) or "$tensor" not in leaf:
                raise UserError(f"{place} holds {name}, which is no tensor; {KINDS}", BAD_RUN)
            self.paths[name] = leaf["$tensor"]
            self.shapes[name] = torch.Size(self.manifest["tensors"][leaf["$tensor"]]["size"])
        self.files: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """See WeightSource.read."""
        record = self.manifest["tensors"][self.paths[name]]
        dtype = DTYPES[record["dtype"]]
        whole = torch.empty(record["size"], dtype=dtype)
        for chunk in record["chunks"]:
            raw = self._mapped(chunk["file"])[chunk["start"] : chunk["start"] + chunk["bytes"]]
            box = whole
            for dim, (offset, length) in enumerate(zip(chunk["offsets"], chunk["sizes"])):
                box = box.narrow(dim, offset, length)
            box.copy_(raw.view(dtype).view(chunk["sizes"]))
        return whole

    def _mapped(self, name: str) -> Tensor:
        """Returns a file as bytes that are read when they are used."""
        if name not in self.files:
            size = self.manifest["files"][name]["bytes"]
            self.files[name] = torch.from_file(
                str(self.place / name), False, size, dtype=torch.uint8
            )
        return self.files[name]


class ExportedWeights(WeightSource):
    """The model that scripts.export wrote into a folder."""

    def __init__(self, folder: Path):
        self.about = f"export {folder}"
        self.ties = {}
        self.file = SafetensorsFile(folder / WEIGHTS)
        self.shapes = self.file.shapes

    def read(self, name: str) -> Tensor:
        """See WeightSource.read."""
        return self.file.read(name)


def open_weights(text: str, say: Callable[[str], None] = print) -> WeightSource:
    """Opens what init_from= names. Where ranks run, all of them must call it.

    Args:
        text: the value of init_from.
        say: takes a line about a damaged checkpoint that was passed over.

    Raises:
        UserError: there is nothing of a known kind, or it is damaged.
    """
    try:
        return _opened(text, say)
    except UserError as error:
        raise UserError(f"init_from={text}: {error}", error.code) from error
    except (OSError, ValueError) as error:
        raise UserError(f"init_from={text}: it cannot be read ({error}); {KINDS}") from error


def _opened(text: str, say: Callable[[str], None]) -> WeightSource:
    folder = Path(text)
    if text.startswith(HUGGINGFACE):
        return HuggingFaceWeights(Path(text.removeprefix(HUGGINGFACE)))
    if folder.suffix in PICKLED:
        raise UserError(f"a pickled file can run code when it is opened; {KINDS}")
    if not os.path.isdir(folder):
        raise UserError(f"there is no such folder; {KINDS}")
    if run_dir.holds_run(folder) or (folder / "checkpoints").is_dir():
        return CheckpointWeights(_newest(folder, say))
    if (folder / MANIFEST).exists():
        return CheckpointWeights(_whole(folder, say))
    if (folder / WEIGHTS).exists() and (folder / CONFIG).exists():
        return ExportedWeights(folder)
    raise UserError(f"it holds no run, no checkpoint and no export; {KINDS}")


def _newest(run: Path, say: Callable[[str], None]) -> Path:
    """Returns the newest whole checkpoint of a run, the same on every rank."""
    archive = CheckpointReader(run / "checkpoints", say=say)
    try:
        place = archive.latest()
    finally:
        archive.close()
    if place is None:
        raise UserError("it holds no checkpoint yet; train on, or name another run", BAD_RUN)
    return place


def _whole(place: Path, say: Callable[[str], None]) -> Path:
    """Returns a checkpoint after its files were compared with their sums."""
    archive = CheckpointReader(place.parent, say=say)
    try:
        damage = archive.damage(place)
    finally:
        archive.close()
    if damage is not None:
        raise UserError(f"{damage}; name another checkpoint", BAD_RUN)
    return place
