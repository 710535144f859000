"""Measures the linear-time family: growth, speed, state while decoding, bytes between ranks.

Layers are measured forward and backward in one process of `threads` threads, in turn with what they
are compared to. Eight rows of T tokens and one row of 8 T have equally many tokens, so growth is 8
for a linear layer. Medians. The heap is kept (scripts/benchmarks/malloc.py), which a run does not
do: there, page faults come on top. "by cpu" is the same ratio by processor time, which a busy
machine disturbs less.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from models.carried_state import CarriedState, name_stateful_modules
from models.convolution.hyena import Hyena
from models.convolution.short_conv import ShortConv
from models.init import initialise
from models.primitives.causal_conv import CausalConv
from models.primitives.long_conv import LongConv
from models.primitives.scan import Scan
from models.recurrent.delta import DeltaNet, GatedDeltaNet
from models.recurrent.gated_linear import GatedLinear
from models.recurrent.linear import LinearAttention
from models.recurrent.mamba2 import Mamba2
from models.recurrent.performer import Performer
from models.recurrent.retention import Retention
from models.recurrent.rwkv6 import Rwkv6
from models.recurrent.rwkv7 import Rwkv7
from models.span import Span
from parallel.collectives import Communicator
from parallel.drivers.causal_conv import Halo
from parallel.drivers.scan import StatePassing
from parallel.layout import zigzag
from parallel.partition import unit_ranges
from parallel.sharding import shard_span
from scripts.benchmarks.attention import parse_into
from scripts.benchmarks.malloc import keep_heap
from scripts.benchmarks.timing import BenchmarkEntry, alternate, gathered, middle

# how much longer a row gets; the most its time may grow; in units of the bare FFTs'
TIMES = 8
GOAL = 9.5
HYENA_GOAL = 1.2
TAPS = 4
BARE = "bare FFTs"
KINDS = "scan, decay per head", "scan, decay per channel", "scan, low rank", "window"
LAYERS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "linear": lambda width, heads, _: LinearAttention(width, heads),
    "performer": lambda width, heads, _: Performer(width, heads, seed=0, layer=0),
    "retention": lambda width, heads, _: Retention(width, heads),
    "gated_linear": lambda width, heads, _: GatedLinear(width, heads),
    "rwkv6": lambda width, heads, _: Rwkv6(width, heads, layer=0, layers=2),
    "rwkv7": lambda width, heads, _: Rwkv7(width, heads, layer=0, layers=2),
    "delta": lambda width, heads, _: DeltaNet(width, heads),
    "gated_delta": lambda width, heads, _: GatedDeltaNet(width, heads),
    "mamba2": lambda width, heads, _: Mamba2(width, heads),
    "short_conv": lambda width, heads, _: ShortConv(width),
    "hyena": lambda width, heads, tokens: Hyena(width, tokens),
}


Build = Callable[
    [], tuple[Callable[[], Tensor], list[Tensor]]
]  # what is called, and the leaves that get gradients
WAYS = ("", ""), ("processor_", "_by_cpu")


@dataclass(frozen=True)
class MixerSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    tokens: int = 8192
    heads: int = 8
    width: int = 64
    layer_heads: int = 4
    layer_width: int = 64
    ranks: int = 2
    threads: int = 1
    repeats: int = 3
    seed: int = 0
    device: str = "cpu"


def parse(words: list[str]) -> MixerSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into."""
    return parse_into(MixerSizes(), words)


class MixerBenchmark:
    """Builds what is measured, on the first rank and only when it is run."""

    def __init__(self, sizes: MixerSizes, group: Any):
        self.sizes = sizes
        self.group = group
        self.rank = dist.get_rank(group)
        self.ranks = dist.get_world_size(group)
        keep_heap()

    def noise(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.sizes.seed)
        return torch.randn(*shape, generator=generator).to(self.sizes.device)

    def line(self, tokens: int) -> Span:
        return Span.line(1, tokens, device=self.sizes.device)

    def entry(self, name: str, tokens: int, build: Build, rows: int = 1) -> BenchmarkEntry:
        """Forward and backward of a call over `rows` rows, one after the other."""
        built = cache(build)

        def step() -> None:
            torch.set_num_threads(self.sizes.threads)
            call, leaves = built()
            for _ in range(rows):
                for leaf in leaves:
                    leaf.grad = None
                call().sum().backward()

        return BenchmarkEntry(name, {"tokens": tokens, "rows": rows}, step, alone=True)

    def layer(self, name: str, tokens: int, rows: int) -> BenchmarkEntry:
        """One of the family."""
        sizes = self.sizes

        def build():
            layer = LAYERS[name](sizes.layer_width, sizes.layer_heads, tokens)
            layer = initialise(layer, seed=sizes.seed).to(sizes.device)
            x = self.noise(1, tokens, sizes.layer_width).requires_grad_()
            span = self.line(tokens)
            return lambda: layer(x, span), [x, *layer.parameters()]

        return self.entry(name, tokens, build, rows)

    def transforms(self, tokens: int, rows: int) -> BenchmarkEntry:
        """The six FFTs of one convolution of a Hyena layer, and nothing else."""

        def step() -> None:
            torch.set_num_threads(self.sizes.threads)
            x = x_of()
            for _ in range(rows):
                for _ in range(3):
                    torch.fft.irfft(torch.fft.rfft(x, 2 * tokens))

        x_of = cache(lambda: self.noise(1, self.sizes.layer_width, tokens))
        return BenchmarkEntry(BARE, {"tokens": tokens, "rows": rows}, step, alone=True)

    def attention(self, name: str, tokens: int) -> BenchmarkEntry:
        """Scan in chunks or step by step, or SDPA, of heads x width."""
        heads = self.sizes.heads
        width = self.sizes.width

        def build():
            q, k, v = (
                x.requires_grad_()
                for x in self.noise(3, 1, tokens, heads, width).mul(width**-0.5).unbind()
            )
            span = self.line(tokens)
            leaf = Scan()
            decay = torch.full((1, tokens, heads), -0.05, device=q.device)
            calls = {
                "scan in chunks": lambda: leaf((q,), (k, v, decay), span=span),
                "scan step by step": lambda: leaf.recur((q,), (k, v, decay), span=span)[0],
                "SDPA, causal": lambda: _attend(q, k, v),
            }
            return calls[name], [q, k, v]

        return self.entry(name, tokens, build)

    def taken(self, entries: list[BenchmarkEntry]) -> list[dict]:
        """Returns the durations of each entry, after one run that does not count."""
        for entry in entries:
            if self.rank == 0:
                entry.step()
            dist.barrier(self.group)
        rows = []
        for entry, runs in zip(entries, alternate(entries, self.sizes.repeats, self.sizes.threads)):
            each = gathered(middle(runs))
            times = {"seconds": each[0][0], "processor_seconds": each[0][1]}
            rows.append({"name": entry.name, **entry.facts, **times})
        return rows

    def growth(self, name: str) -> dict:
        """One row of 8 T tokens in units of T tokens: 8 where 8 rows of T take as long."""
        tokens = self.sizes.tokens
        make = self.transforms if name == BARE else partial(self.layer, name)
        few, many = self.taken([make(tokens, TIMES), make(TIMES * tokens, 1)])
        return {"name": name, "tokens": many["tokens"], "seconds": many["seconds"]} | {
            f"growth{end}": TIMES * many[f"{kind}seconds"] / few[f"{kind}seconds"]
            for kind, end in WAYS
        }

    def speed(self, tokens: int) -> list[dict]:
        """The scan beside what it must beat, in units of its time."""
        names = [
            "scan in chunks",
            "SDPA, causal",
            *(["scan step by step"] if tokens == self.sizes.tokens else []),
        ]
        rows = self.taken([self.attention(name, tokens) for name in names])
        for row in rows:
            row |= {
                f"times{end}": row[f"{kind}seconds"] / rows[0][f"{kind}seconds"]
                for kind, end in WAYS
            }
        return rows

    def state(self, name: str, tokens: int) -> int | None:
        """Bytes that a layer keeps from row to row after so many tokens of a document; None: it has
        to read all again."""
        sizes = self.sizes
        row = 64
        layer = initialise(LAYERS[name](sizes.layer_width, sizes.layer_heads, row), seed=sizes.seed)
        if any(isinstance(module, LongConv) for module in layer.modules()):
            return None
        name_stateful_modules(layer)
        past = CarriedState()
        x = torch.ones(1, row, sizes.layer_width)
        with torch.no_grad():
            for start in range(0, tokens, row):
                pos = torch.arange(start, start + row)[None]
                layer(x, past.attach(Span.of(pos, torch.zeros_like(pos))))
                past.advance()
        return past.bytes()

    def sent(self, kind: str, tokens: int) -> tuple[int, int]:
        """(bytes that this rank sends in one forward and backward, what the formula says), in a
        zigzag."""
        sizes = self.sizes
        communicator = Communicator(self.group)
        here = shard_span(Span.line(1, tokens), [zigzag(tokens, self.ranks)], self.rank)
        x = torch.ones(1, here.shape[1], sizes.heads, sizes.width).requires_grad_()
        if kind == "window":
            flat = x.flatten(2)
            Halo(CausalConv(), communicator)(
                (flat,), (flat.new_ones(TAPS, flat.shape[2]),), span=here
            ).sum().backward()
            return sum(communicator.bytes_sent.values()), halo_bytes(
                flat.shape[2] * 4, TAPS - 1, self.rank, self.ranks
            )
        channel = kind != "scan, decay per head"
        low = kind == "scan, low rank"
        decay = -x.square() if channel else -x.square().mean(-1)
        StatePassing(Scan(), communicator)(
            (x,), (x, x, decay, *((x, -x / sizes.width) if low else ())), span=here
        ).sum().backward()
        kept = sizes.width**2 if low else sizes.width if channel else 1
        return sum(communicator.bytes_sent.values()), passing_bytes(
            sizes.heads, kept * 4, sizes.width**2 * 4, self.rank, self.ranks
        )


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
    )


def passing_bytes(pairs: int, keep: int, state: int, rank: int, ranks: int, runs: int = 2) -> int:
    """Returns the bytes that state passing sends on a rank, forward and backward.

    Args:
        pairs: of a row and a head.
        keep: bytes of the decay of a run.
        state: bytes of a state.
        rank: that sends.
        ranks: that share the sequence.
        runs: of each rank.
    """
    first, last = unit_ranges(pairs, ranks)[rank]
    own_pairs = last - first
    # Summaries go to the rank that folds a pair, states come back to the owners of the runs.
    summaries = (pairs - own_pairs) * runs
    states = own_pairs * (ranks - 1) * runs
    return (summaries + states) * (keep + state) + (states + summaries) * state


def halo_bytes(token: int, reach: int, rank: int, ranks: int) -> int:
    """Returns the bytes that the halo of a causal convolution sends on a rank, in a zigzag.

    At each border of two ranks `reach` tokens go forward, and their gradients come back.
    """
    owners = [*range(ranks), *reversed(range(ranks))]
    own_borders = 0
    for left, right in zip(owners[:-1], owners[1:]):
        # The two middle chunks belong to the same rank: nothing is sent between them.
        if left != right:
            own_borders += (left == rank) + (right == rank)
    return token * reach * own_borders


def measure(sizes: MixerSizes, group: Any) -> Iterator[dict]:
    """One row of figures after the other; on every rank, in step."""
    bench = MixerBenchmark(sizes, group)
    bare = 0.0
    for name in (BARE, *LAYERS):
        row = bench.growth(name)
        bare = row["growth"] if name == BARE else bare
        goal = None if name == BARE else HYENA_GOAL * bare if name == "hyena" else GOAL
        yield {"section": "growth", **row, "goal": goal}
    for tokens in (sizes.tokens, 2 * sizes.tokens):
        for row in bench.speed(tokens):
            yield {"section": "speed", **row}
    for name in LAYERS:
        yield {
            "section": "state",
            "name": name,
            "bytes": [bench.state(name, tokens) for tokens in (64, 4096)],
        }
    for kind in KINDS:
        for tokens in (sizes.tokens, TIMES * sizes.tokens):
            sent, formula = zip(*gathered(bench.sent(kind, tokens)))
            yield {
                "section": "sent",
                "name": kind,
                "tokens": tokens,
                "sent_bytes": sent,
                "formula_bytes": formula,
            }


def table(rows: list[dict]) -> str:
    """Rows as text, section by section."""
    return "\n".join(
        part
        for title, line in SECTIONS.items()
        for part in ("", TITLES[title], *map(line, of(rows, title)))
    )


def of(rows: list[dict], section: str) -> list[dict]:
    return [row for row in rows if row["section"] == section]


def _growth(row: dict) -> str:
    goal = f"goal {row['goal']:.1f}" if row["goal"] else "every goal of hyena is 1.2 of this"
    cells = (
        f"{1e3 * row['seconds']:10.0f} ms {row['growth']:8.2f} {row['growth_by_cpu']:8.2f} by cpu"
    )
    return f"{row['name']:20}{row['tokens']:8}{cells}   {goal}"


def _speed(row: dict) -> str:
    cells = f"{1e3 * row['seconds']:10.0f} ms {row['times']:8.2f} {row['times_by_cpu']:8.2f} by cpu"
    return f"{row['name']:20}{row['tokens']:8}{cells}"


def _state(row: dict) -> str:
    return f"{row['name']:20}" + (
        "the whole document" if None in row["bytes"] else "{:10} {:10}".format(*row["bytes"])
    )


def _sent(row: dict) -> str:
    verdict = (
        "equal to the formula"
        if row["sent_bytes"] == row["formula_bytes"]
        else f"formula {row['formula_bytes']}"
    )
    return f"{row['name']:24}{row['tokens']:8} {max(row['sent_bytes']):10} bytes, {verdict}"


SECTIONS = {"growth": _growth, "speed": _speed, "state": _state, "sent": _sent}
TITLES = {
    "growth": (
        "a row of so many tokens, forward and backward; its time in units of a row of an eighth"
        " of it"
    ),
    "speed": (
        "heads x width of attention, forward and backward; time in units of the scan in chunks"
    ),
    "state": "bytes kept from row to row, after 64 and after 4,096 tokens",
    "sent": "bytes that the busiest rank sends, forward and backward, in a zigzag",
}
