"""python -m scripts.export SOURCE OUTPUT [KEY=VALUE ...]: a checkpoint's model as safetensors.

    format=huggingface     for AutoModelForCausalLM.from_pretrained, in place of our own form
    dtype=bfloat16         of its weights: float64, float32, bfloat16 or float16; as trained
    max_shard_bytes=5e9    of each of its files
    format=peft            the adapters alone, in peft's format
    trust=true             see below

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
from trainer.export_huggingface import export_huggingface, their_settings
from trainer.init_from.adapters import CONFIG as ADAPTER_CONFIG
from trainer.init_from.adapters import WEIGHTS as ADAPTER
from trainer.init_from.adapters import export_adapter

FORMATS = ("longspan", "huggingface", "peft")
USAGE = (
    "two folders are wanted: python -m scripts.export RUN_DIR OUTPUT [format=huggingface|peft]"
    " [dtype=bfloat16] [max_shard_bytes=5e9] [trust=true]"
)


def _chosen(given: dict[str, str], key: str, choices: Sequence[str], default: str) -> str:
    value = given.pop(key, default)
    if value not in choices:
        raise UserError(f"{key}={value}: choose one of {', '.join(choices)}")
    return value


def _export(folders: Sequence[str], given: dict[str, str]) -> str:
    """Exports in the form that was asked for; returns the line that says so."""
    source, output = map(Path, folders)
    trust = _chosen(given, "trust", ("true", "false"), "false") == "true"
    form = _chosen(given, "format", FORMATS, "longspan")
    settings = their_settings(given, USAGE)
    if form == "huggingface":
        step = export_huggingface(source, output, trust, **settings)
        return f"{output}: the model of step {step}"
    if settings:
        raise UserError(f"{next(iter(settings))} is for format=huggingface; {USAGE}")
    if form == "peft":
        step = export_adapter(source, output, trust)
        return f"{output / ADAPTER}, {output / ADAPTER_CONFIG}: the adapters of step {step}"
    step = export(source, output, trust)
    return f"{output / WEIGHTS}, {output / CONFIG}: the model of step {step}"


def main(words: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in words):
        print(__doc__)
        return 0
    folders = [word for word in words if "=" not in word]
    if len(folders) != 2:
        print(USAGE, file=sys.stderr)
        return BAD_CONFIG
    try:
        line = _export(folders, dict(word.split("=", 1) for word in words if "=" in word))
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(
            f"{error.filename or folders[1]}: {error.strerror}; mend that and give the same command"
            " again",
            file=sys.stderr,
        )
        return BAD_RUN
    print(line)
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
