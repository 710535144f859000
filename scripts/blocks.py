"""python -m scripts.blocks [TOKENS]: measures the blocks of a ring of 4 and 8 ranks on one device.

Prints JSON lines, in units of one undivided call; on the first GPU in bfloat16 and float32, or on
the CPU in float32. Exit status 1 when the blocks do not join to the result of one call, 2 when
TOKENS (default 32768) is not a multiple of 16.
"""

import json
import sys

import torch

from scripts.benchmarks.ring_blocks import measure
from trainer.entry import run_command

RANKS = (4, 8)
REPEATS = 5
TOKENS = 32768


def main(words: list[str]) -> int:
    if len(words) > 1 or not all(word.isdigit() for word in words):
        print("python -m scripts.blocks takes one word, a number of tokens", file=sys.stderr)
        return 2
    tokens = int(words[0]) if words else TOKENS
    device = torch.device("cpu")
    # Few CPUs compute in bfloat16 at all.
    dtypes = (torch.float32,)
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        dtypes = (torch.bfloat16, torch.float32)
    all_exact = True
    for dtype in dtypes:
        try:
            for row in measure(device, dtype, tokens, RANKS, REPEATS):
                print(json.dumps(row), flush=True)
                all_exact = all_exact and row["exact"]
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
    return int(not all_exact)


if __name__ == "__main__":
    run_command(main, __doc__)
