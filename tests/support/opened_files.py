"""Imported, it names in the file OPENED_LOG what this process and its forks open of a checkout."""

import os
import sys
from typing import Any

LOG = os.open(os.environ["OPENED_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
BELOW = os.path.join(os.environ["OPENED_BELOW"], "")
PACKAGES = os.path.join(os.environ["OPENED_PACKAGES"], "")  # may lie within the checkout
READS = ("open", "os.listdir", "os.scandir")


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in READS or not isinstance(arguments[0], str | bytes | os.PathLike):
        return
    path = os.path.join(os.path.abspath(os.fsdecode(arguments[0])), "")
    if path.startswith(BELOW) and not path.startswith(PACKAGES):
        os.write(LOG, f"{path[:-1]}\n".encode())


sys.addaudithook(_note)
