"""Weights by name, and the safetensors file that most of them lie in."""

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import BAD_RUN, UserError
from trainer.files.safe_files import LINKED

WEIGHTS = "model.safetensors"  # what scripts.export writes
CONFIG = "config.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class WeightSource:
    """Weights by the names that a model of ours gives them.

    Attributes:
        about: what they are, for the log.
        shapes: the shape of every tensor, known before any is read.
        ties: names that stand for the same tensor as another, with that other name.
    """

    about: str
    shapes: dict[str, torch.Size]
    ties: dict[str, str]

    def read(self, name: str) -> Tensor:
        """Returns the whole tensor of that name on the CPU; nothing else is kept.

        Raises:
            UserError: it cannot be read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `read`")


class SafetensorsFile:
    """One safetensors file, checked by its header when it is opened; tensors are read singly.

    Raises:
        UserError: the file is missing, a link, cut off or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            status = path.lstat()
        except OSError as error:
            raise UserError(
                f"{path} is missing ({error.strerror}); get it again", BAD_RUN
            ) from error
        if stat.S_ISLNK(status.st_mode):
            raise UserError(f"{path}: {LINKED}", BAD_RUN)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no ordinary file; get it again", BAD_RUN)
        self.file: Any = self._guarded(lambda: safe_open(path, "pt", device="cpu"))
        self.shapes: dict[str, torch.Size] = {}
        for name in self.file.keys():  # noqa: SIM118 (it is no mapping)
            self.shapes[name] = torch.Size(self.file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Returns a tensor on the CPU."""
        return self._guarded(lambda: self.file.get_tensor(name))

    def _guarded(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(
                f"{self.path} is cut off or no safetensors file ({error}); get it again", BAD_RUN
            ) from error
