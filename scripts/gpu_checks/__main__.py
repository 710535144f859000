"""python -m scripts.gpu_checks [STEP [dry]]: what scripts/gpu_check.sh runs.

Without a word: all steps, in LIMIT seconds (environment; 800), files into OUT (the folder at hand),
DRY=1 with tiny sizes on the CPU, ONLY="drivers ring" some of them. With the name of a step: that
one in this process, which waits for "go SECONDS" on standard input. Exit status: the number of
steps that did not pass.
"""

import os
import sys
from pathlib import Path

from scripts.gpu_checks.conductor import conduct
from scripts.gpu_checks.one_step import run_step
from scripts.gpu_checks.schedule import STEPS
from trainer.entry import run_command

SHORTEST_S = 60  # a shorter limit goes into starts


def main(words: list[str]) -> int:
    names = [step.name for step in STEPS]
    only = os.environ.get("ONLY", "").split()
    for name in (*only, *words[:1]):
        if name not in names:
            print(f"{name}: there is no such step; there are {', '.join(names)}", file=sys.stderr)
            return 2
    if words:
        return run_step(words[0], dry="dry" in words[1:])
    limit = os.environ.get("LIMIT", "800")
    dry = os.environ.get("DRY") or "0"
    if not limit.isdecimal() or int(limit) < SHORTEST_S:
        print(f"LIMIT={limit}: must be seconds, at least {SHORTEST_S}; use 800", file=sys.stderr)
        return 2
    if dry not in ("0", "1"):
        print(f"DRY={dry}: must be 0 or 1; use DRY=1 to rehearse on the CPU", file=sys.stderr)
        return 2
    return conduct(Path(os.environ.get("OUT", ".")), float(limit), only, dry=dry == "1")


if __name__ == "__main__":
    run_command(main, __doc__)
