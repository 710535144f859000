"""One step in its process: prepares itself, waits for its turn, and prints rows of JSON."""

import json
import os
import sys
import time
import traceback
from importlib import import_module
from typing import Any

READY = "ready"
GO = "go"


def run_step(name: str, *, dry: bool) -> int:
    """Runs a step of this folder; returns the exit status, 1 where something did not pass.

    Rows go to standard output, and the seconds of the turn come from standard input.
    """
    module = import_module(f"scripts.gpu_checks.{name}")
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # Everything else that is printed, by libraries and their processes too, goes to the log.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(row: dict[str, Any]) -> None:
        rows.write(json.dumps(row) + "\n")
        rows.flush()

    began = time.monotonic()
    try:
        prepared = module.prepare(dry)
    except Exception:
        tell({"error": "while it was prepared: " + last_lines()})
        return 1
    tell({READY: round(time.monotonic() - began, 1)})
    word, _, seconds = sys.stdin.readline().partition(" ")
    if word != GO:
        return 1
    began = time.monotonic()
    fine = True
    try:
        for row in module.check(prepared, float(seconds)):
            fine = fine and row.get("passed") is not False
            tell(row)
    except Exception:
        tell({"error": last_lines()})
        fine = False
    tell({"ended": fine, "seconds": round(time.monotonic() - began, 1)})
    return int(not fine)


def last_lines(most: int = 1500) -> str:
    """Returns the end of the traceback of the exception at hand."""
    return traceback.format_exc()[-most:]
