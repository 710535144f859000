"""Refuses to start where a stranger's package stands in the place of one of Longspan's.

Longspan's packages have plain names, so a folder of the user's that is called `models` and holds an
`__init__.py` may be found first. Nothing of Longspan's may be imported here: this is what runs
before it.
"""

import importlib.util
import sys
from pathlib import Path

OWN = ("models", "parallel", "trainer")


def stranger() -> str | None:
    """Returns a message about the first package that is not Longspan's; None where all are."""
    root = Path(__file__).resolve().parents[1]
    for name in OWN:
        module = sys.modules.get(name)
        spec = importlib.util.find_spec(name) if module is None else module.__spec__
        if spec is None:
            return f"{name}: Longspan's package is missing beside {root}; install Longspan again"
        # A namespace package, which has no file, never stands in front of a real one.
        if spec.origin is None or Path(spec.origin).resolve().parent != root / name:
            return (
                f"{name}: {spec.origin} is found in the place of Longspan's own {root / name};"
                f" give that folder another name, or start where `import {name}` does not find it"
            )
    return None


def demand_own_packages() -> None:
    """Raises ImportError where a package is not Longspan's."""
    if message := stranger():
        raise ImportError(message)
