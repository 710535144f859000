"""Longspan as a library: models of runs, checkpoints, exports and Hugging Face folders in Python.

    import longspan

    model = longspan.load("runs/mine")
    print(model.generate("def ", tokens=100))

docs/library.md describes every name. They are imported when they are first used, so that
`import longspan` is quick and a stranger's package in front of ours is said before anything runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

from longspan.own_packages import demand_own_packages

if TYPE_CHECKING:
    from trainer.errors import UserError
    from trainer.library.build import build, check
    from trainer.library.examine import examine
    from trainer.library.load import load
    from trainer.library.loaded_model import LoadedModel
    from trainer.library.train import TrainedRun, train
    from trainer.version import VERSION as __version__

__all__ = [
    "LoadedModel",
    "TrainedRun",
    "UserError",
    "__version__",
    "build",
    "check",
    "examine",
    "load",
    "train",
]

_PLACES = {
    "LoadedModel": "trainer.library.loaded_model.LoadedModel",
    "TrainedRun": "trainer.library.train.TrainedRun",
    "UserError": "trainer.errors.UserError",
    "__version__": "trainer.version.VERSION",
    "build": "trainer.library.build.build",
    "check": "trainer.library.build.check",
    "examine": "trainer.library.examine.examine",
    "load": "trainer.library.load.load",
    "train": "trainer.library.train.train",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module longspan has no {name}; it has {', '.join(__all__)}")
    demand_own_packages()
    module, _, attribute = _PLACES[name].rpartition(".")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
