"""Notes how a job of an array ended: `-m trainer.sweep.record_outcome FOLDER STATUS SECONDS`.

The batch script of trainer/sweep/slurm_array.py gives this command when a task ends.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.errors import DONE as WELL
from trainer.files.limited_reader import json_object
from trainer.launch.exit_report import SAVED
from trainer.sweep.jobs import DONE, FAILED, OUTCOME, STOPPED, JobOutcome
from trainer.sweep.slurm_array import SETTINGS


def record_outcome(folder: Path, code: int, seconds: float) -> JobOutcome:
    """Writes outcome.json of a job.

    Args:
        folder: of the job.
        code: exit status of its batch script.
        seconds: that it ran this time.
    """
    settings = [str(word) for word in json_object(folder / SETTINGS, follow=False)["settings"]]
    before = 0.0
    if (folder / OUTCOME).is_file():
        before = float(json_object(folder / OUTCOME, follow=False).get("seconds", 0.0))
    kind = FAILED
    message = ""
    if code == WELL:
        kind = DONE
    elif code in SAVED.values():
        kind = STOPPED
    else:
        array = os.environ.get("SLURM_ARRAY_JOB_ID", "?")
        task = os.environ.get("SLURM_ARRAY_TASK_ID", "?")
        message = f"see slurm-{array}_{task}.out"
    outcome = JobOutcome(settings, kind, code, before + seconds, message)
    outcome.write(folder)
    return outcome


def main(words: Sequence[str]) -> None:
    """Does what the words of the command say."""
    folder, code, seconds = words
    record_outcome(Path(folder), int(code), float(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
