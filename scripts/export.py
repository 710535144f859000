"""python -m scripts.export SOURCE OUTPUT [format=peft] [trust=true]: a checkpoint's model as one
safetensors file and a config.json.

SOURCE is a run directory (its newest whole checkpoint) or a checkpoint in it; whatever ranks and
engine wrote it. Where its config names classes that are not Longspan's, these are built with
trust=true alone, for that runs the code of whoever wrote them. Adapters (lora.rank) are merged into
the weights; with format=peft they alone are written, in peft's format. Exit status 2 for a wish
that cannot be honoured, 3 where the checkpoint is damaged or the disk full.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.entry import run_command
from trainer.errors import BAD_CONFIG, BAD_RUN, UserError
from trainer.export import CONFIG, WEIGHTS, export
from trainer.init_from.adapters import CONFIG as ADAPTER_CONFIG
from trainer.init_from.adapters import WEIGHTS as ADAPTER
from trainer.init_from.adapters import export_adapter

PEFT = "format=peft"
TRUST = {"trust=true": True, "trust=false": False}


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    as_adapter = PEFT in words
    folders = [word for word in words if word not in TRUST and word != PEFT]
    trust = any(TRUST.get(word, False) for word in words)
    if len(folders) != 2:
        print(
            "two folders are wanted: python -m scripts.export RUN_DIR OUTPUT [format=peft]"
            " [trust=true]",
            file=sys.stderr,
        )
        return BAD_CONFIG
    source, output = map(Path, folders)
    try:
        step = (export_adapter if as_adapter else export)(source, output, trust)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(
            f"{error.filename or output}: {error.strerror}; mend that and give the same command"
            " again",
            file=sys.stderr,
        )
        return BAD_RUN
    names = (ADAPTER, ADAPTER_CONFIG) if as_adapter else (WEIGHTS, CONFIG)
    what = "adapters" if as_adapter else "model"
    print(f"{output / names[0]}, {output / names[1]}: the {what} of step {step}")
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
