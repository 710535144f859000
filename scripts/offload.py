"""python -m scripts.offload [tokens=16384] [width=1024] [layers=8]: a step with and without its
activations on the host.

JSON lines, on the first GPU in bfloat16 and float32, for every kind of activation checkpointing:
peaks measured and predicted, bytes sent, seconds. Exit status 1 when a loss or gradient changes or
a peak is no lower, 2 for words that mean nothing or where there is no GPU.
"""

import json
import sys

import torch

from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.offload import OffloadSizes, measure
from trainer.entry import run_command


def main(words: list[str]) -> int:
    try:
        sizes = parse_into(OffloadSizes(), words)
        fine = True
        if not torch.cuda.is_available():
            raise ValueError(
                "there is no GPU here, or torch was built without CUDA: activations lie on the host"
                " already"
            )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for precision in ("bfloat16", "float32"):
        for row in measure(torch.device("cuda", 0), precision, sizes):
            print(json.dumps(row), flush=True)
            fine &= row["exact"] and row["offloaded_peak_bytes"] < row["peak_bytes"]
    return 0 if fine else 1


if __name__ == "__main__":
    run_command(main, __doc__)
