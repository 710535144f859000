"""A run that is started from Python, and its model afterwards:

python -m examples.train_in_python runs/example
torchrun --nproc-per-node=2 -m examples.train_in_python runs/shared parallel.context=2

The first starts its rank itself; in the second every process is a rank.
"""

import sys
from pathlib import Path

import longspan

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
    # The same checks as on the command line; what is wrong raises a UserError that says it.
    return longspan.train([*SETTINGS, *more, f"run_dir={directory}"]).losses


if __name__ == "__main__":
    losses = main(Path(sys.argv[1]), *sys.argv[2:])
    print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}")
    model = longspan.load(sys.argv[1])
    print(f"loss of a line: {model.loss('import os'):.3f}")
