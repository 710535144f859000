"""python -m scripts.export SOURCE OUTPUT: a checkpoint's model as one safetensors file and a config.json.

SOURCE is a run directory (its newest whole checkpoint) or a checkpoint in it; whatever ranks and engine wrote it. Exit status 2
for a wish that cannot be honoured, 3 where the checkpoint is damaged or the disk full.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config import BAD_RUN, BAD_WISH, Fault
from trainer.export import CONFIG, WEIGHTS, export


def main(words: Sequence[str]) -> int:
    if len(words) != 2:
        print("two folders are wanted: python -m scripts.export RUN_DIR OUTPUT", file=sys.stderr)
        return BAD_WISH
    source, output = map(Path, words)
    try:
        step = export(source, output)
    except Fault as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(f"{error.filename or output}: {error.strerror}; mend that and give the same command again", file=sys.stderr)
        return BAD_RUN
    print(f"{output / WEIGHTS}, {output / CONFIG}: the model of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
