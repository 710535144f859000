"""python -m scripts.agree [float32] [float64] [engines]: compares whole runs with one device.

Every row of the table is a run through `python -m trainer`, on a packed text of uneven documents
whose rows no number of ranks divides; the figure is the largest relative difference of any of its
losses. `engines` tries every engine on 2 and 4 ranks, with and without context parallelism and
accumulation, and compares gradient norms too. Exit status 1 when a figure is above its bound.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.verify.whole_runs import PLANS, compare


def run(words: Sequence[str], ranks: int, directory: Path) -> None:
    """Starts one run by the command that a user gives, and waits for its end."""
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, stdout=subprocess.DEVNULL)


def main(names: Sequence[str]) -> int:
    unknown = sorted(set(names) - set(PLANS))
    if unknown:
        sys.exit(f"scripts.agree: unknown {', '.join(unknown)}; choose from {', '.join(PLANS)}")
    all_agree = True
    for name in names or PLANS:
        plan = PLANS[name]
        columns = " or ".join(plan.columns)
        print(
            f"{name}: largest relative difference of {columns} from one device's in"
            f" {plan.steps} steps"
        )
        with tempfile.TemporaryDirectory() as folder:
            for case, error in compare(run, Path(folder), name):
                agrees = error < plan.tolerance
                all_agree = all_agree and agrees
                verdict = "ok " if agrees else "NOT"
                print(f"{name}  {error:8.1e}  {verdict}  {case}", flush=True)
    return int(not all_agree)


if __name__ == "__main__":
    run_command(main, __doc__)
