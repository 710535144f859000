"""summary.json of a run directory: facts that are one number for the whole run, whatever its steps.

`parameters`, `active_parameters` (what a token visits) and `flops_per_token` (training, one
document as long as a row, models/cost/flops.py); `ranks`; `sent_bytes_per_step`, of the rank that
sends most, by the moves that share a sequence or its experts (parallel/collectives.py), in the
first step since the last start, null where that one was not logged; and at the end `step`,
`tokens`, the lowest training loss and the best of held-out loss, the middle step's tokens a second,
peak memory, of a task the last grades, as held_out_NAME, and the last figures of the named
evaluations, as needle/accuracy.
"""

import json
import os
from pathlib import Path
from typing import Any

from trainer.files.limited_reader import json_object
from trainer.files.safe_files import replace_inside

SUMMARY = "summary.json"


def read(directory: Path) -> dict[str, Any]:
    """Reads the summary of a run; an empty dictionary when there is no file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    path = directory / SUMMARY
    if not os.path.lexists(path):
        return {}
    try:
        return json_object(path, follow=False)
    except ValueError as error:
        raise ValueError(f"{error}; remove it") from error


def note(directory: Path, **facts: Any) -> None:
    """Adds facts to those of earlier starts of the run; the file is replaced whole."""
    try:
        known = read(directory)
    except ValueError:
        known = {}  # what a broken disk left; a run does not end for it
    replace_inside(directory, SUMMARY, json.dumps({**known, **facts}, indent=2) + "\n")
