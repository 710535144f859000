"""Measures attention shared over ranks against one device, other layouts and another project.

All entries are measured in turn in one run: ratios between rows are meaningful, seconds on a busy
machine are not.
"""

import importlib
import importlib.util
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

from models.attention.full import CAUSAL
from models.masks.algebra import Mask
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.span import Span
from parallel import traffic
from parallel.collectives import Communicator, Pending
from parallel.context_parallel import METHODS
from parallel.drivers.key_exchange import gather_plan
from parallel.layout import layouts
from parallel.load_balance import imbalance, visible_keys
from parallel.sharding import shard_span
from scripts.benchmarks.timing import (
    BenchmarkEntry,
    StepCall,
    alternate,
    gathered,
    middle,
    peak_bytes,
)

PEER = "ring_attention_pytorch"
# reach of the window; its long row is so many times the short one
WINDOW = 512
FAR = 4


@dataclass(frozen=True)
class AttentionSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 8192
    heads: int = 8
    kv_heads: int = 8
    width: int = 64
    ranks: int = 2
    threads: int = 1
    repeats: int = 5
    seed: int = 0
    device: str = "cpu"


def documents(tokens: int, seed: int) -> Span:
    """One row of documents whose lengths are lognormal, as packed text has them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (torch.randn(tokens, generator=generator) * 1.2 + 6.5).exp().long().clamp_min(1)
    doc = torch.arange(tokens).repeat_interleave(lengths)[:tokens]
    start = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])[doc]
    return Span.of((torch.arange(tokens) - start)[None], doc[None])


def _leaves(
    shape: tuple[int, ...], count: int, generator: torch.Generator, device: str
) -> torch.Tensor:
    return (
        torch.randn(1, shape[0], count, shape[1], generator=generator).to(device).requires_grad_()
    )


def _step(call: Any, tensors: list[torch.Tensor], weight: torch.Tensor) -> StepCall:
    def step() -> None:
        for t in tensors:
            t.grad = None
        call(*tensors).backward(weight)

    return step


class AttentionBenchmark:
    """Builds entries; each knows its part of the step on this rank."""

    def __init__(self, sizes: AttentionSizes, group: Any):
        self.sizes = sizes
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        torch.set_num_threads(sizes.threads)

    def tensors(self, tokens: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """q, k, v and the gradient of what comes out."""
        sizes, generator = self.sizes, torch.Generator().manual_seed(self.sizes.seed)
        counts = sizes.heads, sizes.kv_heads, sizes.kv_heads
        leaves = [_leaves((tokens, sizes.width), n, generator, sizes.device) for n in counts]
        return leaves, torch.randn(1, tokens, sizes.heads, sizes.width, generator=generator).to(
            sizes.device
        )

    def plain(self, tokens: int) -> BenchmarkEntry:
        """PyTorch's own attention in one process, with the threads of all ranks."""
        tensors, weight = self.tensors(tokens if self.rank == 0 else 1)

        def call(q, k, v):
            lines = (x.transpose(1, 2) for x in (q, k, v))
            grouped = self.sizes.heads != self.sizes.kv_heads
            return scaled_dot_product_attention(
                *lines, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)

        return BenchmarkEntry(
            "one device, SDPA", {"tokens": tokens}, _step(call, tensors, weight), alone=True
        )

    def alone(self, span: Span, mask: Mask) -> BenchmarkEntry:
        """Our attention in one process, with the threads of all ranks."""
        tensors, weight = self.tensors(span.shape[1] if self.rank == 0 else 1)
        leaf = Softmax(mask)
        here = span if self.rank == 0 else Span.line(1, 1, self.sizes.device)
        step = _step(lambda q, k, v: leaf((q,), (k, v), span=here), tensors, weight)
        return BenchmarkEntry("one device, ours", {"tokens": span.shape[1]}, step, alone=True)

    def shared(self, method: str, policy: str, span: Span, mask: Mask) -> BenchmarkEntry:
        """Our attention over all ranks."""
        side = 2 if method == "usp" else 1
        communicator = Communicator(self.group)
        leaf = Softmax(mask)
        communicator.heads = side if method == "usp" else None
        driver = METHODS[method](leaf, communicator)
        here = shard_span(span, layouts(policy, span, self.ranks, heads=side), self.rank)
        tensors, weight = self.tensors(here.shape[1])
        step = _step(lambda q, k, v: driver((q,), (k, v), span=here), tensors, weight)
        step()
        sent = sum(communicator.bytes_sent.values())
        formula = self.formula(method, here, mask, tensors)
        keys = here.sharding.shard(visible_keys(span, mask), 0)
        facts = {
            "tokens": span.shape[1],
            "layout": policy,
            "sent_bytes": gathered(sent),
            "formula_bytes": gathered(formula),
            "balance": imbalance(gathered(int(keys.sum()))),
        }
        return BenchmarkEntry(method, facts, step)

    def formula(self, method: str, here: Span, mask: Mask, tensors: list[torch.Tensor]) -> int:
        """Bytes that this rank should send, forward and backward."""
        q, k, v = (traffic.tensor_spec(t, 2) for t in tensors)
        job = traffic.AttentionShape(
            here.pos.numel(), here.pos.numel(), (q,), (k, v), q._replace(width=v.width)
        )
        if method == "allgather":
            plan = gather_plan(mask, here, here, torch.arange(self.sizes.heads))
            return traffic.allgather_traffic(
                job, [len(g) for g in plan.gives], plan.takes, self.rank
            ).total
        if method == "usp":
            return traffic.usp_traffic(job, 2, self.ranks // 2, self.rank % 2).total
        return (
            traffic.ring_traffic(job, self.ranks)
            if method == "ring"
            else traffic.ulysses_traffic(job, self.ranks, self.rank)
        ).total

    def peer(self, tokens: int) -> BenchmarkEntry:
        """The ring of ring-attention-pytorch, striped, which is the balanced form of that
        project."""
        module = importlib.import_module(PEER)
        tensors, weight = self.tensors(tokens // self.ranks)

        def call(q, k, v):
            return module.ring_flash_attn(q, k, v, None, True, 512, True, True, None, self.ranks)

        return BenchmarkEntry(
            PEER, {"tokens": tokens, "layout": "striped"}, _step(call, tensors, weight)
        )


def sections(bench: AttentionBenchmark) -> Iterator[tuple[str, list[BenchmarkEntry]]]:
    """Yields the title and the entries of each section."""
    tokens = bench.sizes.tokens
    usp = bench.ranks > 2 and bench.ranks % 2 == 0
    traded = [
        (m, "zigzag")
        for m, fits in (("ulysses", bench.sizes.heads >= bench.ranks), ("usp", usp))
        if fits
    ]

    device = bench.sizes.device
    line = Span.line(1, tokens, device)
    ways = [("ring", "zigzag"), ("ring", "contiguous"), ("allgather", "zigzag"), *traded]
    entries = [
        bench.plain(tokens),
        bench.alone(line, CAUSAL),
        *(bench.shared(*way, line, CAUSAL) for way in ways),
    ]
    if importlib.util.find_spec(PEER) and tokens % bench.ranks == 0:
        entries.append(bench.peer(tokens))
    yield "one causal document", entries

    packed = documents(tokens, bench.sizes.seed).map(lambda x: x.to(device))
    ways = [("ring", "zigzag"), ("ring", "balanced"), ("allgather", "balanced"), *traded]
    entries = [bench.alone(packed, CAUSAL), *(bench.shared(*way, packed, CAUSAL) for way in ways)]
    yield f"{int(packed.doc.max()) + 1} packed documents", entries

    seen = CAUSAL & SlidingWindow(WINDOW)
    far = Span.line(1, FAR * tokens, device)
    entries = [bench.alone(line, seen)]
    for row in (line, far):
        entries += [
            bench.shared("allgather", "contiguous", row, seen),
            bench.shared("ring", "zigzag", row, seen),
        ]
    yield f"window of {WINDOW}", entries


def measure(sizes: AttentionSizes, group: Any) -> Iterator[dict]:
    """One row of figures after the other; on every rank, in step."""
    bench = AttentionBenchmark(sizes, group)
    for title, entries in sections(bench):
        peaks = [
            gathered(peak_bytes(e.step) if bench.rank == 0 or not e.alone else None)
            for e in entries
        ]
        for entry, runs, peak in zip(
            entries, alternate(entries, sizes.repeats, sizes.threads), peaks
        ):
            each = gathered(middle(runs))
            row = {
                "section": title,
                "name": entry.name,
                "alone": entry.alone,
                "ranks": bench.ranks,
                **entry.facts,
            }
            row["seconds"] = each[0][0]
            row["processor_seconds"] = max(e[1] for e in each)
            if not entry.alone:
                row["waiting_shares"] = gathered(_waiting_share(entry, sizes))
            yield {**row, "peak_bytes": max((p for p in peak if p is not None), default=None)}


def _waiting_share(entry: BenchmarkEntry, sizes: AttentionSizes) -> float | None:
    """Returns the part of a step in which this rank waits for what others send, by measurement.

    None on a GPU, where nobody waits on the host.
    """
    if sizes.device != "cpu":
        return None
    wait = Pending.wait
    waits: list[float] = []

    def timed_wait(self: Pending) -> list[torch.Tensor]:
        began = time.perf_counter()
        arrived = wait(self)
        waits.append(time.perf_counter() - began)
        return arrived

    shares = []
    Pending.wait = timed_wait
    try:
        for _ in range(sizes.repeats):
            dist.barrier()
            waits.clear()
            began = time.perf_counter()
            entry.step()
            shares.append(sum(waits) / (time.perf_counter() - began))
    finally:
        Pending.wait = wait
    return median(shares)


def parse(words: list[str]) -> AttentionSizes:
    """`key=value` words.

    Raises:
        ValueError: as parse_into does, heads that cannot be grouped, or one rank, which shares
            nothing.
    """
    found = parse_into(AttentionSizes(), words)
    if found.heads % found.kv_heads:
        raise ValueError(
            f"kv_heads={found.kv_heads} does not divide heads={found.heads}; use a divisor of"
            f" {found.heads}"
        )
    if found.ranks < 2:
        raise ValueError("ranks=1 shares nothing; use ranks=2 or more")
    return found


def parse_into(found: Any, words: list[str]) -> Any:
    """`found`, a dataclass of whole numbers and words, with what `key=value` words say.

    Raises:
        ValueError: a key that is none, a value that is no number of at least one, or a device that
            is not here.
    """
    for word in words:
        key, _, value = word.partition("=")
        if key not in vars(found):
            raise ValueError(
                f"{word}: the bench has no setting {key!r}; there are {', '.join(vars(found))}"
            )
        if key == "device":
            if value not in ("cpu", "cuda"):
                raise ValueError(f"{word}: the bench knows the devices cpu and cuda")
            if value == "cuda" and not torch.cuda.is_available():
                raise ValueError(
                    f"{word}: there is no GPU here, or torch was built without CUDA; use device=cpu"
                )
        is_word = isinstance(getattr(found, key), str)
        if not is_word and (not value.isdigit() or (int(value) < 1 and key != "seed")):
            raise ValueError(f"{word}: {key} is a whole number of at least 1")
        found = replace(found, **{key: value if is_word else int(value)})
    return found


def _exposed(shares: list[float | None]) -> str:
    measured = [share for share in shares if share is not None]
    return f"{max(measured):.2f}" if measured else ""


COLUMNS = (
    "name",
    "layout",
    "tokens",
    "ms",
    "against one",
    "by cpu",
    "sent MB",
    "formula",
    "balance",
    "exposed",
    "peak MB",
)


def table(rows: list[dict]) -> str:
    """Rows as text.

    `against one` is time in units of the first row of the section. `by cpu` is the same by
    processor time, the busiest rank against the one device's share for each thread: what the ratio
    would be on a machine that does nothing else. `exposed` is the part of a step in which the rank
    that waits longest waits for what others send; on a busy machine also for when they compute.
    """
    lines = []
    first = {}
    for row in rows:
        if row["section"] not in first:
            first[row["section"]] = row["seconds"], row["processor_seconds"] / row["ranks"]
            lines += [
                "",
                row["section"],
                "  ".join(f"{c:>11}" if i else f"{c:24}" for i, c in enumerate(COLUMNS)),
            ]
        one, share = first[row["section"]]
        own = row["processor_seconds"] / (row["ranks"] if row["alone"] else 1)
        sent = row.get("sent_bytes")
        formula = row.get("formula_bytes")
        cells = [
            row["name"],
            row.get("layout", ""),
            row["tokens"],
            f"{1e3 * row['seconds']:.0f}",
            f"{row['seconds'] / one:.3f}",
            f"{own / share:.3f}",
            f"{max(sent) / 1e6:.2f}" if sent else "",
            "" if sent is None else "equal" if sent == formula else "DIFFERS",
            f"{row['balance']:.3f}" if "balance" in row else "",
            _exposed(row.get("waiting_shares", [None])),
            f"{(row['peak_bytes'] or 0) / 1e6:.0f}",
        ]
        lines.append("  ".join(f"{c:>11}" if i else f"{c:24}" for i, c in enumerate(cells)))
    return "\n".join(lines)
