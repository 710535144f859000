"""python -m scripts.agree [float32] [float64] [engines]: whole runs, spread in every way, against
one device; prints the table.

Every row is a run of its own through `python -m trainer`, on a packed text of uneven documents
whose rows no number of ranks divides; the figure is the largest relative difference of any of its
losses. `engines`: every engine, on 2 and 4 ranks, with and without context parallelism and
accumulation; gradient norms too. Exit status 1 when one is above its bound.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.verify.whole_runs import PLANS, compare


def run(words: Sequence[str], ranks: int, directory: Path) -> None:
    """One run by the command that a user gives."""
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, stdout=subprocess.DEVNULL)


def main(names: Sequence[str]) -> int:
    wrong = 0
    if unknown := set(names) - set(PLANS):
        sys.exit(f"scripts.agree knows {', '.join(PLANS)}, not {', '.join(sorted(unknown))}")
    for name in names or PLANS:
        plan = PLANS[name]
        print(
            f"{name}: largest relative difference of {' or '.join(plan.columns)} from one device's"
            f" in {plan.steps} steps"
        )
        with tempfile.TemporaryDirectory() as folder:
            for case, error in compare(run, Path(folder), name):
                fine = error < plan.tolerance
                wrong += not fine
                print(f"{name}  {error:8.1e}  {'ok ' if fine else 'NOT'}  {case}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    run_command(main, __doc__)
