"""python -m scripts.fuzz [seed=0] [many=300] [mistakes=300]: try what nobody thought of.

`many` random runs (mixer x position x memory x method x layout x ranks x engine x precision x
lengths), three steps
each, against one rank: equal to 1e-9 in float64 and as rounding allows below, or refused up front.
`mistakes` mistyped
settings: refused with a message, or a run that works. Prints every finding with its settings; exit
status 1 where there is one.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import UserError
from trainer.verify.fuzz import fuzz

WISHES = {"seed": 0, "many": 300, "mistakes": 300}


def wishes(words: Sequence[str]) -> dict[str, int]:
    """What the command line asks for. Raises Fault for a word that this command does not know."""
    asked = dict(WISHES)
    for word in words:
        key, _, value = word.partition("=")
        if key not in WISHES or not (value.isascii() and value.isdecimal()):
            raise UserError(f"{word}: write {', '.join(f'{name}=NUMBER' for name in WISHES)}")
        asked[key] = int(value)
    return asked


def main(words: Sequence[str]) -> int:
    asked = wishes(words)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a mistyped name asks no network
    with tempfile.TemporaryDirectory() as folder:
        findings = fuzz(Path(folder), **asked, say=lambda text: print(text, flush=True))
    print(f"{len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    run_command(main, __doc__)
