"""The version of Longspan, which pyproject.toml reads from here."""

import platform
from importlib import metadata

VERSION = "0.1.0"


def version_line() -> str:
    """Returns what --version prints."""
    torch = metadata.version("torch")
    return f"longspan {VERSION} (torch {torch}, Python {platform.python_version()})"
