"""Run as a program with TRITON_INTERPRET=1: drivers of softmax attention over three ranks whose
blocks our Triton kernels compute, in the interpreter, against one process in float64.

Arguments: words of the form CASE/METHOD/LAYOUT; none for all of them. Prints a line of JSON for
each: the worst relative difference of any rank, by output and gradient, and how often each rank
called the kernels.

Whether a kernel is interpreted is decided when Triton is imported, and the ranks of
tests/support/pool.py are forked from a process that has: these are forked from this program.
Blocks of 16 let 22 tokens of a rank have several.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from models.kernels import backends
from models.kernels.triton_attention import dispatch, launch
from models.kernels.triton_attention.sizes import BlockConfig
from models.masks.algebra import Mask
from models.masks.basic import Causal, FirstTokens, SameDocument, SlidingWindow
from models.masks.sparse import DilatedWindow, RandomBlocks
from models.positions.alibi import AlibiScore
from models.positions.t5 import T5Score, edges
from models.primitives.softmax import Softmax
from models.scores import Score, SinkScore, SoftcapScore
from parallel.collectives import Communicator
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.layout import contiguous, zigzag
from parallel.sharding import shard_span
from tests.support.parity import packed, relative

RANKS = 3
TIMEOUT_S = 300
TOKENS = 66
# The last of three contiguous ranks has nothing but padding.
LENGTHS = [[13, 1, 19], [3, 30, 1, 1]]
HEADS = 3
BUCKETS = 6

DOCUMENTS = Causal() & SameDocument()
T5_BOTH_WAYS = T5Score(edges(BUCKETS // 2, 9), True, 1.0)
# name -> (mask, score, shapes of its params)
CASES: dict[str, tuple[Mask, Score, list[tuple[int, ...]]]] = {
    "alibi": (DOCUMENTS, AlibiScore(HEADS), []),
    "t5": (SameDocument(), SoftcapScore(T5_BOTH_WAYS, 1.5), [(BUCKETS + 2, HEADS)]),
    "sinks": (
        DOCUMENTS & (SlidingWindow(9) | FirstTokens(2)),
        SinkScore(SoftcapScore(Score(), 2.0)),
        [(HEADS,)],
    ),
    "by-head": (
        DOCUMENTS
        & (
            DilatedWindow(3, (1, 2, 4))
            | RandomBlocks(4, 1, 1, 1, seed=1, layer=0, patterns=HEADS, both=True)
        ),
        Score(),
        [],
    ),
}
METHODS = {"ring": Ring, "allgather": AllGather, "ulysses": Ulysses}
LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}


def tensors(name: str) -> list[torch.Tensor]:
    """q, k, v, the params of the score, and the weight of the output; one key head serves all."""
    generator = torch.Generator().manual_seed(2)
    token = (HEADS, 6), (1, 6), (1, 5), (HEADS, 5)
    q, k, v, weight = (
        torch.randn(len(LENGTHS), TOKENS, *shape, generator=generator, dtype=torch.float64)
        for shape in token
    )
    params = [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in CASES[name][2]
    ]
    return [q, k, v, *params, weight]


def attend(core: nn.Module, span: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output and the gradients of q, k, v and params; nothing at padding counts."""
    q, k, v, *params = (leaf.clone().requires_grad_() for leaf in leaves[:-1])
    valid = span.valid()[..., None, None]
    output = core((q,), (k, v), params, span=span)
    loss = (output.masked_fill(~valid, 0) * leaves[-1]).sum()
    gradients = torch.autograd.grad(loss, (q, k, v, *params))
    return [output.detach().masked_fill(~valid, 0), *gradients]


def compare(name: str, method: str, layout: str, called: list[str]) -> dict[str, Any]:
    """Of this rank: differences, and calls of the kernels since the last case."""
    mask, score, _ = CASES[name]
    whole = packed(LENGTHS, TOKENS)
    wide = tensors(name)
    wanted = attend(Softmax(mask, score), whole, wide)
    here = shard_span(whole, [LAYOUTS[layout](TOKENS, RANKS)], dist.get_rank())
    shard = here.sharding.shard
    *tokens, weight = wide[:3] + wide[-1:]
    local = [shard(x, 0).float() for x in tokens]
    local += [x.float() for x in wide[3:-1]] + [shard(weight, 0).float()]
    driver = METHODS[method](Softmax(mask, score), Communicator(dist.group.WORLD))
    called.clear()
    output, *gradients = attend(driver, here, local)
    for gradient in gradients[3:]:
        dist.all_reduce(gradient)
    found = [output, *gradients]
    wanted = [shard(x, 0) for x in wanted[:4]] + wanted[4:]
    labels = ["output", "q", "k", "v", *(f"param {i}" for i in range(len(wanted) - 4))]
    differences = {
        label: relative(got.double(), want)
        for label, got, want in zip(labels, found, wanted, strict=True)
    }
    return {"differences": differences, "called": sorted(called), "tokens": int(here.valid().sum())}


def force_kernels() -> list[str]:
    """Has our kernels serve the CPU in small blocks; returns what is called, as it goes on."""
    served = backends.PAIRWISE | {("cpu", torch.float32)}
    backends.PAIRWISE = dispatch.PAIRWISE = served
    launch._size = lambda *about: BlockConfig(16, 16, 4, 1)
    called = []

    def noted(name, plain):
        def call(*args, **kwargs):
            called.append(name)
            return plain(*args, **kwargs)

        return call

    for name in ("forward", "backward"):
        setattr(launch, name, noted(name, getattr(launch, name)))
    return called


def serve(rank: int, words: list[tuple[str, str, str]], folder: str, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    called = force_kernels()
    try:
        results.put((rank, [compare(*word, called) for word in words]))
    except BaseException:
        traceback.print_exc()
        results.put((rank, None))
    dist.destroy_process_group()


def main(words: list[str]) -> None:
    every = [
        f"{name}/{method}/{layout}" for name in CASES for method in METHODS for layout in LAYOUTS
    ]
    asked = words or every
    assert set(asked) <= set(every), asked
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    cases = [tuple(word.split("/")) for word in asked]
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(RANKS):
            context.Process(target=serve, args=(rank, cases, folder, results), daemon=True).start()
        by_rank = {}
        while len(by_rank) < RANKS:
            rank, found = results.get(timeout=TIMEOUT_S)
            if found is None:
                sys.exit(f"rank {rank} failed")
            by_rank[rank] = found
    for number, word in enumerate(asked):
        print(json.dumps({"case": word, "ranks": [by_rank[r][number] for r in range(RANKS)]}))


if __name__ == "__main__":
    main(sys.argv[1:])
