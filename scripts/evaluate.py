"""python -m scripts.evaluate SOURCE [SOURCE ...] [evaluation=[needle,ruler]] [KEY=VALUE ...]
[json=PATH] [trust=true]: evaluates finished models side by side.

SOURCE is a run directory (its newest whole checkpoint), a checkpoint in it, a folder that
scripts.export wrote, or that of a Hugging Face model (data= is then chosen as in training).
`evaluation=` chooses as in training, one name or several in brackets, and
every evaluation has its settings under its own name: evaluation.needle.lengths=[1024,4096].
parallel.context=3 shares each row by three ranks, whatever the run had; data.KEY=VALUE finds data
that has moved. Prints one table with a column for each model; json=PATH writes a line for each
figure, json=- prints these instead of the table. trust=true builds classes of other packages that
a source names. Exit status 0 done, 2 for what cannot be honoured, 3 where a source is damaged.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer.entry import asks_for_help, run_command
from trainer.errors import BAD_CONFIG, BAD_RUN, DONE, UserError
from trainer.evaluation.offline import Row, evaluate_models, table

JSON = "json="
TRUST = {"trust=true": True, "trust=false": False}


def main(words: Sequence[str]) -> int:
    if asks_for_help(words):
        print(__doc__)
        return DONE
    trust = any(TRUST.get(word, False) for word in words)
    path = next((word.removeprefix(JSON) for word in words if word.startswith(JSON)), None)
    rest = [word for word in words if word not in TRUST and not word.startswith(JSON)]
    sources = [word for word in rest if "=" not in word or Path(word).is_dir()]
    settings = [word for word in rest if word not in sources]
    if not sources:
        print("a model is wanted: python -m scripts.evaluate RUN_OR_EXPORT ...", file=sys.stderr)
        return BAD_CONFIG
    try:
        rows = evaluate_models(sources, settings, trust)
        lines = [json.dumps(row._asdict()) for row in rows]
        if path is not None and path != "-":
            Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    except UserError as fault:
        print(fault, file=sys.stderr)
        return fault.code
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; mend that and try again", file=sys.stderr)
        return BAD_RUN
    if path == "-":
        print("\n".join(lines))
    else:
        show(rows)
    return DONE


def show(rows: Sequence[Row]) -> None:
    """Prints the table."""
    head, *body = table(rows)
    shown = Table()
    for index, name in enumerate(head):
        shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for line in body:
        shown.add_row(*line)
    # Without a terminal rich assumes 80 columns, and would wrap every line.
    Console(width=None if sys.stdout.isatty() else 60 + 40 * len(head)).print(shown)


if __name__ == "__main__":
    run_command(main, __doc__)
