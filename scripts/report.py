"""python -m scripts.report DIRECTORY [baseline=NAME]: what a run or a sweep came to, as one HTML
file that needs nothing else.

DIRECTORY is that of a run, of a sweep, or a folder of runs. DIRECTORY/report/index.html has the
settings that differ, a table of variants (parameters, FLOPs a token, losses with their spread over
seeds, tokens/s, peak memory, bytes sent), learning curves, loss and grades against cost, loss by
position, and the command of each run; the pictures lie beside it as PNG files, and the table, which
is printed too, in markdown. Runs that failed or go on still are rows that say so. Exit status 2
where there is no run, 3 where the disk will not have the report.

baseline=NAME, a variant such as model=full or one of its runs, adds a table of the differences from
it, with their spread over seeds.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, BAD_RUN, DONE, UserError
from trainer.reports.page import TABLE, write

BASELINE = "baseline="


def main(words: Sequence[str]) -> int:
    # A directory may have a name with = in it.
    named = [word for word in words if word.startswith(BASELINE) and not Path(word).is_dir()]
    folders = [word for word in words if word not in named]
    if len(folders) != 1 or len(named) > 1:
        usage = "python -m scripts.report RUN_OR_SWEEP_DIR [baseline=NAME]"
        print(f"one directory is wanted: {usage}", file=sys.stderr)
        return BAD_CONFIG
    baseline = named[0].removeprefix(BASELINE) if named else None
    try:
        page = write(Path(folders[0]), baseline)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(
            f"{error.filename or folders[0]}: {error.strerror}; mend that and give the same command"
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
