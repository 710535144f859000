"""python -m scripts.blocks [TOKENS]: what the blocks of a ring of 4 and 8 ranks cost on one device,
against one call.

JSON lines; on the first GPU in bfloat16 and float32, or on the CPU in float32. Exit status 1 when
the blocks do not join to what one call computes, 2 when TOKENS (default 32768) is no multiple of
16.
"""

import json
import sys

import torch

from scripts.benchmarks.ring_blocks import measure
from trainer.entry import run_command

RANKS = (4, 8)
REPEATS = 5


def main(words: list[str]) -> int:
    if len(words) > 1 or not all(word.isdigit() for word in words):
        print("python -m scripts.blocks takes one word, a number of tokens", file=sys.stderr)
        return 2
    tokens = int(words[0]) if words else 32768
    exact = True
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    for dtype in (torch.bfloat16, torch.float32) if gpu else (torch.float32,):
        try:
            for row in measure(device, dtype, tokens, RANKS, REPEATS):
                print(json.dumps(row), flush=True)
                exact &= row["exact"]
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return 0 if exact else 1


if __name__ == "__main__":
    run_command(main, __doc__)
