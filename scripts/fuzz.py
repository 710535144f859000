"""python -m scripts.fuzz [seed=0] [many=300] [mistakes=300]: tries random and mistyped settings.

`many` random runs (mixer x position x memory x method x layout x ranks x engine x precision x
lengths) of three steps are compared with one rank: equal to 1e-9 in float64 and within rounding
below, or refused before the first step. `mistakes` mistyped settings must be refused with a
message, or give a run that works. Prints every finding with its settings; exit status 1 when there
is one.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import UserError
from trainer.verify.fuzz_lanes import fuzz

DEFAULTS = {"seed": 0, "many": 300, "mistakes": 300}


def parse_words(words: Sequence[str]) -> dict[str, int]:
    """Reads the words of the command line.

    Raises:
        UserError: a word has an unknown key, or its value is not a number.
    """
    settings = dict(DEFAULTS)
    for word in words:
        key, _, value = word.partition("=")
        # isdecimal alone would accept digits of other scripts.
        is_number = value.isascii() and value.isdecimal()
        if key not in DEFAULTS or not is_number:
            choices = ", ".join(f"{name}=NUMBER" for name in DEFAULTS)
            raise UserError(f"{word}: write {choices}")
        settings[key] = int(value)
    return settings


def main(words: Sequence[str]) -> int:
    settings = parse_words(words)
    # A mistyped name of a data set must not be looked up in the network.
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        findings = fuzz(
            Path(folder),
            seed=settings["seed"],
            runs=settings["many"],
            mistakes=settings["mistakes"],
            say=lambda text: print(text, flush=True),
        )
    print(f"{len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    run_command(main, __doc__)
