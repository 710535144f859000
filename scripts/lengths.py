"""python -m scripts.lengths RUN_DIR [batches=N] [trust=true]: loss by position before and after a
context was lengthened.

RUN_DIR is that of a run in stages. The last checkpoint of every stage is read under its own
positions, and those of earlier stages also under the positions of the longest stage, all over the
same held-out rows of the longest stage. Prints a markdown table, a column for each range of
positions in a document. Exit status 2 for a wish that cannot be honoured, 3 where a checkpoint is
damaged or missing.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, DONE, UserError
from trainer.evaluation.by_length import losses_by_length, table

BATCHES = "batches="
TRUST = {"trust=true": True, "trust=false": False}


def main(words: Sequence[str]) -> int:
    """Prints the table of a run; returns the exit status."""
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return DONE
    counts = [word.removeprefix(BATCHES) for word in words if word.startswith(BATCHES)]
    folders = [word for word in words if word not in TRUST and not word.startswith(BATCHES)]
    count = counts[-1] if counts else "4"
    if len(folders) != 1 or not count.isdecimal() or not int(count):
        print(
            "one directory is wanted: python -m scripts.lengths RUN_DIR [batches=4] [trust=true]",
            file=sys.stderr,
        )
        return BAD_CONFIG
    trust = any(TRUST.get(word, False) for word in words)
    try:
        results = list(losses_by_length(Path(folders[0]), int(count), trust))
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    print(table(results))
    return DONE


if __name__ == "__main__":
    run_command(main, __doc__)
