"""python -m scripts.report DIRECTORY: what a run or a sweep came to, as one HTML file that needs
nothing else.

DIRECTORY is that of a run, of a sweep, or a folder of runs. DIRECTORY/report/index.html has a table
of variants (parameters, FLOPs a token, losses with their spread over seeds, tokens/s, peak memory,
bytes sent), learning curves, loss against cost, loss by position, and the command of each run; the
pictures lie beside it as PNG files, and the table, which is printed too, in markdown. Runs that
failed or go on still are rows that say so. Exit status 2 where there is no run, 3 where the disk
will not have the report.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, BAD_RUN, DONE, UserError
from trainer.reports.page import TABLE, write


def main(words: Sequence[str]) -> int:
    if len(words) != 1:
        print("one directory is wanted: python -m scripts.report RUN_OR_SWEEP_DIR", file=sys.stderr)
        return BAD_CONFIG
    try:
        page = write(Path(words[0]))
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(
            f"{error.filename or words[0]}: {error.strerror}; mend that and give the same command"
            " again",
            file=sys.stderr,
        )
        return BAD_RUN
    table = page.with_name(TABLE)
    print(table.read_text(encoding="utf-8"))
    for path in (page, table, *sorted(page.parent.glob("*.png"))):
        print(path)
    return DONE


if __name__ == "__main__":
    run_command(main, __doc__)
