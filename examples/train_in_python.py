"""A run that is started from Python, in this process, and read afterwards:

python -m examples.train_in_python runs/example
"""

import sys
from pathlib import Path

from trainer.launch.elastic import init_process_group
from trainer.logs.jsonl import METRICS, read
from trainer.preflight.prepare import create_run_dir, load_config, write_record
from trainer.stages import run

SETTINGS = (
    "model=hybrid",
    "model.width=64",
    "model.layers=4",
    "model.heads=4",
    "context_length=256",
    "batch_tokens=1024",
    "steps=20",
    "wandb.mode=disabled",
)


def main(directory: Path, *more: str) -> list[float]:
    """Trains with SETTINGS and `more`, and returns the loss of every step in nats per token."""
    words = (*SETTINGS, *more, f"run_dir={directory}")
    # The same checks as on the command line; what is wrong raises a UserError that says it.
    config = load_config(words, started=1)
    config, directory = create_run_dir(config)
    write_record(config, directory)
    run(config, init_process_group(), directory)
    return [row["loss"] for row in read(directory / METRICS)]


if __name__ == "__main__":
    losses = main(Path(sys.argv[1]), *sys.argv[2:])
    print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}")
