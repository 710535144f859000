"""python -m scripts.bench NAME [key=value ...]: what something costs; JSON and a table.
NAME is a word that begins a paragraph below.

attention: forward and backward over ranks, beside one device with as many threads. Words: tokens,
heads, kv_heads, width, ranks, threads (of a rank), repeats, seed, device.
cache: what paged and contiguous caches waste on one mix of requests. Words: requests, limit (tokens
of a request), memory (tokens), page_tokens, samples, seed.
decode: tokens/s beside transformers' generate with the same weights; the step of a recurrent model.
Words: tokens, repeats, threads, longest and recurrent (contexts), most (tokens of all prompts).
mixers: the linear-time family: growth with the row, speed beside softmax, state while decoding,
bytes between ranks; minutes on 2 cores. Words: tokens, heads, width (of a head), layer_heads,
layer_width, ranks, threads, repeats, seed, device.
experts: one device and shared, beside a dense layer of the same FLOPs. Words: tokens, width, ffn,
experts, ranks, ...
time: a row cut in time: its peak memory at two lengths, and its time beside full checkpointing.
Words: tokens (of the shorter row), times, piece, compare, width, heads, layers, window, ...
part: the model of any settings of a run, as mixer._target_=mine.Averaged, beside full attention.
Words: tokens, times, repeats, threads, seed, device, and the settings.
plan: the peak memory of scripts.plan beside the measured one. Words: ranks (1 to 4).
context: whether the largest context of scripts.plan fits, and 1.25 x it not. Words: memory (MiB).
steps: the quickstart beside plain PyTorch; seconds to step 1. Words: steps, repeats, threads.
reading: what a step waits for its batch, with and without reading ahead. Words: tokens, context,
steps, step_ms, seed.
sparse: LSH and compressed attention beside full attention. Words: tokens, width, heads, hashes, ...
overlap: what a link slowed on purpose adds. Words: tokens, heads, width, percent, ranks, ...
memory: what a longer Transformer-XL memory adds to a step, beside the attention that it adds.
Words: tokens, repeats, ... `--device cuda` is device=cuda: each rank takes a GPU, and mixers on a
single one want ranks=1. Medians of alternated runs.
"""

import json
import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch.distributed as dist

from trainer.entry import run_command
from trainer.launch.elastic import init_process_group, start_ranks
from trainer.launch.starters import Incomplete, adopt, started

NAMES = "attention cache context decode experts memory mixers overlap part plan reading sparse"
BENCHES = [*NAMES.split(), "steps", "time"]
MODULES = {"time": "time_pieces"}  # where the module has another name than the word


def main(words: list[str]) -> int:
    if not words or words[0] not in BENCHES:
        print(
            f"what is measured is the first word: python -m scripts.bench {'|'.join(BENCHES)}",
            file=sys.stderr,
        )
        return 2
    chosen = import_module(f"scripts.benchmarks.{MODULES.get(words[0], words[0])}")
    try:
        sizes = chosen.parse(
            " ".join(words[1:])
            .replace("--device ", "device=")
            .replace("--device=", "device=")
            .split()
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        if (outer := started()) is not None:
            adopt(outer)
    except Incomplete as error:
        print(error, file=sys.stderr)
        return 2
    if outer is None:
        with tempfile.TemporaryDirectory() as folder:
            outcome = start_ranks(
                ["-u", "-m", "scripts.bench", *words],
                ranks=sizes.ranks,
                scratch=Path(folder) / "ranks",
            )
        print(outcome.message, file=sys.stderr)
        return outcome.code
    ranks = init_process_group()
    rows = []
    load = os.getloadavg()[0]
    for row in chosen.measure(sizes, dist.group.WORLD):
        rows.append(row)
        if ranks.rank == 0:
            print(json.dumps(row), flush=True)
    if ranks.rank == 0:
        after = os.getloadavg()[0]
        print(
            chosen.table(rows),
            f"\nload of the machine: {load:.1f} before, {after:.1f} after (1 = one busy core)",
        )
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    run_command(main, __doc__)
