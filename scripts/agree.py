"""python -m scripts.agree [float32] [float64]: whole runs, spread in every way, against one device; prints the table.

Every row is a run of its own through `python -m trainer`, on a packed text of uneven documents whose rows no number of ranks
divides; the figure is the largest relative difference of any of its 30 losses. Exit status 1 when one is above its bound.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.parity import LENGTH, STEPS, TOLERANCES, compare


def run(words: Sequence[str], ranks: int, directory: Path) -> None:
    """One run by the command that a user gives."""
    subprocess.run([sys.executable, "-m", "trainer", *words], check=True, stdout=subprocess.DEVNULL)


def main(precisions: Sequence[str]) -> int:
    wrong = 0
    if unknown := set(precisions) - set(TOLERANCES):
        sys.exit(f"scripts.agree knows {', '.join(TOLERANCES)}, not {', '.join(sorted(unknown))}")
    print(f"{STEPS} steps, rows of {LENGTH} tokens; largest relative difference of a step's loss from one device's")
    with tempfile.TemporaryDirectory() as folder:
        for precision in precisions or TOLERANCES:
            bound = TOLERANCES[precision]
            for case, error in compare(run, Path(folder), precision):
                fine = error < bound
                wrong += not fine
                print(f"{precision}  {error:8.1e}  {'ok ' if fine else 'NOT'}  {case}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
