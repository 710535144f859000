"""Measures the blocks of a ring on one device, the P ranks taken in turn, where nothing is sent.

It is the share of kernels and merging in a ring, and the proof that partial results join exactly on
this device. Letters: P ranks.
"""

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from models.attention.full import CAUSAL
from models.kernels import blockwise
from models.kernels.reference import finite_lse
from models.primitives.softmax import attention_spec
from models.scores import Score
from models.span import Span
from parallel.layout import layouts
from parallel.sharding import SequenceSharding, shard_span

BOUND = {
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
}  # of the largest gradient; each block rounds to its own precision


def _turns(tensors: list[Tensor], d_out: Tensor, cuts: list[Span]) -> list[Tensor]:
    """(mean, d_q, d_k, d_v) in global order, by the forward and the backward pass of every rank,
    one after the other."""
    q, k, v = tensors
    what = attention_spec(CAUSAL, Score(), (q,), None)
    out = [torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (d_out, q, k, v)]
    parts = [[_part(x, i.sharding) for x in (q, k, v, d_out)] for i in cuts]
    sums = [blockwise.Gradients.zeros((p[0],), (p[1], p[2]), ()) for p in parts]
    for rank, here in enumerate(cuts):
        mine = parts[rank][0]
        d_mine = parts[rank][3].float()
        total = blockwise.empty_partial((mine,), q.shape[2], v.shape[3])
        order = [(rank - step) % len(cuts) for step in range(len(cuts))]
        for source in order:
            blockwise.forward(what, (mine,), parts[source][1:3], (), here, cuts[source], total)
        total = total[0].to(mine.dtype).float(), finite_lse(total[1])
        delta = (d_mine * total[0]).sum(-1)
        for source in order:
            into = blockwise.Gradients(sums[rank].query, sums[source].payload, [])
            blockwise.backward(
                what,
                (mine,),
                parts[source][1:3],
                (),
                here,
                cuts[source],
                d_out=d_mine,
                total=total,
                delta=delta,
                into=into,
            )
        _put(out[0], total[0], here.sharding)
    for rank, here in enumerate(cuts):
        for whole, part in zip(out[1:], (*sums[rank].query, *sums[rank].payload)):
            _put(whole, part, here.sharding)
    return out


def _part(x: Tensor, cut: SequenceSharding) -> Tensor:
    return x[:, cut.index(cut.rank, 1)[0].to(x.device)]


def _put(whole: Tensor, part: Tensor, cut: SequenceSharding) -> None:
    whole[:, cut.index(cut.rank, 1)[0].to(whole.device)] = part


def _seconds(step: Callable[[], object], repeats: int, device: torch.device) -> float:
    taken = []
    for _ in range(repeats + 1):  # the first warms up, and plans the blocks
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


class RingHeads(NamedTuple):
    """Query heads, key heads and the width of a head."""

    heads: int = 8
    key_heads: int = 2
    width: int = 64


FEW = RingHeads()


def measure(
    device: torch.device,
    dtype: torch.dtype,
    tokens: int,
    ranks: tuple[int, ...],
    repeats: int,
    sizes: RingHeads = FEW,
) -> Iterator[dict]:
    """Seconds of a whole forward and backward pass for each P, and how far it is from the undivided
    one.

    Args:
        ranks: the P that are measured; one undivided call comes before them.
        repeats: timed passes, of which the median counts.

    Raises:
        ValueError: tokens that do not divide into zigzag halves among some P.
    """
    if wrong := [size for size in ranks if tokens % (2 * size)]:
        raise ValueError(
            f"tokens={tokens} does not divide among {wrong[0]} ranks; use a multiple of"
            f" {2 * wrong[0]}"
        )
    generator = torch.Generator().manual_seed(0)
    many = sizes.heads, sizes.width
    few = sizes.key_heads, sizes.width
    shapes = (many, few, few, many)  # of q, k, v and the gradient of the output
    q, k, v, d_out = (
        torch.randn(1, tokens, *s, generator=generator).to(device, dtype) for s in shapes
    )
    line = Span.line(1, tokens)
    truth = []
    one = 0.0
    line = line.map(lambda t: t.to(device))
    for size in (1, *ranks):
        shared = layouts("zigzag", line, size)
        cuts = [shard_span(line, shared, rank) for rank in range(size)]
        found = _turns([q, k, v], d_out, cuts)
        truth = truth or found
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, truth))
        seconds = _seconds(lambda cuts=cuts: _turns([q, k, v], d_out, cuts), repeats, device)
        one = one or seconds
        yield {
            "device": str(device),
            "dtype": str(dtype),
            "tokens": tokens,
            "ranks": size,
            "seconds": seconds,
            "against_one": seconds / one,
            "apart": apart,
            "exact": apart <= BOUND[dtype],
        }
