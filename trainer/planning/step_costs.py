"""The FLOPs, bytes and seconds of a step, counted operation by operation while it is rehearsed.

An operation takes as long as its FLOPs at the rate of its kernel, or as reading and writing its
tensors, whichever is longer (Williams, Waterman & Patterson 2009, the roofline), and no less than a
device needs to start one. What fits into the cache of a core is read and written at its bandwidth,
as if the operation before had left it there. What is sent takes bytes / bandwidth of the slowest
link of its group.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from trainer.planning.devices import Device

MATMUL = "matrix products"
ATTENTION = "attention"
TRAFFIC = "element-wise and copies"
HIDDEN = "gathers and rings"  # travel while something is computed, where a device can do both
EXPOSED = "sums and trades"  # are waited for
HOST_COPIES = "copies to the host and back"
TERMS = (MATMUL, ATTENTION, TRAFFIC, HIDDEN, EXPOSED, HOST_COPIES)
WITHIN = "within a machine"
ACROSS = "across machines"

_aten = torch.ops.aten
CPU_ATTENTION = _aten._scaled_dot_product_flash_attention_for_cpu
CPU_ATTENTION_BACKWARD = _aten._scaled_dot_product_flash_attention_for_cpu_backward
# Products of queries and keys, and of weights and values, forward; and backward, where scores are
# computed once more.
PRODUCTS = {
    CPU_ATTENTION: 2,
    _aten._scaled_dot_product_flash_attention: 2,
    _aten._scaled_dot_product_efficient_attention: 2,
    _aten._scaled_dot_product_cudnn_attention: 2,
    CPU_ATTENTION_BACKWARD: 5,
    _aten._scaled_dot_product_flash_attention_backward: 5,
    _aten._scaled_dot_product_efficient_attention_backward: 5,
    _aten._scaled_dot_product_cudnn_attention_backward: 5,
}
# Rows end to end, [tokens, heads, width], with the places where they begin; windows by an argument.
PACKED = {_aten._flash_attention_forward: 2, _aten._flash_attention_backward: 5}
# Neither read nor write: questions (namespace prim), and memory that is only asked for or named.
IDLE = (
    _aten._unsafe_view,
    _aten.empty,
    _aten.empty_like,
    _aten.empty_strided,
    _aten.new_empty,
    _aten.new_empty_strided,
)
# Read rows of a table, as many as they return, whatever else it has.
READ_ROWS = (_aten.index_select, _aten.gather, _aten.index, _aten.take, _aten.embedding)
# Write rows of a table, and read them before; by the number of the argument that has the rows.
WRITE_ROWS = {
    _aten.index_copy_: 3,
    _aten.index_add_: 3,
    _aten.scatter_: 3,
    _aten.scatter_add_: 3,
    _aten.index_put_: 2,
}
GATHERS = ("send", "_allgather_base_", "allgather_", "_reduce_scatter_base_", "reduce_scatter_")


@dataclass
class StepCosts:
    """Sums over the operations of a step on one rank.

    Attributes:
        device: that computes them.
        precision: of the run, by which rates are chosen: kernels of a GPU take its dtype.
        flops: of matrix products and attention.
        seconds: by TERMS.
        sent: bytes by (operation, link).
    """

    device: Device
    precision: str
    flops: float = 0.0
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)

    def note(self, func: Any, args: Any, result: Any, kwargs: Mapping[str, Any]) -> None:
        """Adds one operation, given its arguments and its result."""
        if func.namespace == "c10d":
            self._note_sent(func, args)
        elif not (func.is_view or func.namespace == "prim" or func.overloadpacket in IDLE):
            self._note_computed(func, args, result, kwargs)

    def copy(self) -> "StepCosts":
        """Returns the same sums, apart from these."""
        return StepCosts(
            self.device,
            self.precision,
            self.flops,
            defaultdict(float, self.seconds),
            Counter(self.sent),
        )

    def add(self, other: "StepCosts", times: int) -> None:
        """Adds the sums of another so many times."""
        self.flops += times * other.flops
        for key, value in other.seconds.items():
            self.seconds[key] += times * value
        for link, size in other.sent.items():
            self.sent[link] += times * size

    @property
    def total_seconds(self) -> float:
        """Seconds of a step: what travels meanwhile is hidden as far as computing lasts."""
        computing = sum(self.seconds[term] for term in (MATMUL, ATTENTION, TRAFFIC))
        waiting = self.seconds[EXPOSED] + self.seconds[HOST_COPIES]
        if self.device.overlaps:
            return max(computing, self.seconds[HIDDEN]) + waiting
        return computing + self.seconds[HIDDEN] + waiting

    @property
    def bottleneck(self) -> str:
        """The term that lasts longest."""
        return max(TERMS, key=lambda term: self.seconds[term])

    def link_to(self, ranks: Iterable[int]) -> str:
        """Returns the slowest link from this rank to those of the whole run."""
        here = dist.get_rank() // self.device.devices
        apart = any(rank // self.device.devices != here for rank in ranks)
        return ACROSS if apart else WITHIN

    def note_host_copy(self, size: int) -> None:
        """Adds bytes that go to the host's memory or come back; they are waited for."""
        self.seconds[HOST_COPIES] += size / self.device.host + self.device.operation_s

    def note_attention(self, flops: float, moved: int) -> None:
        """Adds a kernel of attention that is no operation of torch.

        Args:
            flops: of its products.
            moved: bytes that it reads and writes.
        """
        rate = self.device.rate("attention", self.precision)
        self.flops += flops
        seconds = max(flops / rate, moved / self.device.bandwidth(moved), self.device.operation_s)
        self.seconds[ATTENTION] += seconds

    def _note_computed(self, func: Any, args: Any, result: Any, kwargs: Mapping[str, Any]) -> None:
        moved = bytes_moved(func.overloadpacket, args, result)
        if moved == 0:
            return
        term = TRAFFIC
        flops = 0.0
        rate = 1.0
        packet = func.overloadpacket
        if packet in PRODUCTS:
            term = ATTENTION
            flops = _attention_flops(func, args, PRODUCTS[packet])
            rate = self.device.rate("attention", self.precision)
        elif packet in PACKED:
            term = ATTENTION
            flops = _packed_flops(func, args, kwargs, PACKED[packet])
            rate = self.device.rate("attention", self.precision)
        elif packet in flop_registry:
            term = MATMUL
            flops = float(flop_registry[packet](*args, out_val=result))
            rate = self.device.rate("matmul", self.precision)
        self.flops += flops
        seconds = max(flops / rate, moved / self.device.bandwidth(moved), self.device.operation_s)
        self.seconds[term] += seconds

    def _note_sent(self, func: Any, args: Any) -> None:
        name = func._schema.name.partition("::")[2]
        ranks = _ranks(args)
        if len(ranks) < 2 or name in ("recv_", "barrier", "monitored_barrier_"):
            return
        if name == "send":
            size = sum(tensor.nbytes for tensor in tensors_in(args[0]))
            peers = [ranks[args[2]]]
        else:
            size = _collective_bytes(name, args, len(ranks))
            peers = ranks
        link = self.link_to(peers)
        self.sent[name.strip("_"), link] += size
        term = HIDDEN if name in GATHERS else EXPOSED
        bandwidth = self.device.within if link == WITHIN else self.device.across
        self.seconds[term] += size / bandwidth + self.device.operation_s


def bytes_moved(packet: Any, args: Any, result: Any) -> int:
    """Returns the bytes that an operation reads and writes."""
    if packet in READ_ROWS:
        index = sum(tensor.nbytes for tensor in tensors_in(args[1:]))
        return index + 2 * sum(tensor.nbytes for tensor in tensors_in(result))
    if packet in WRITE_ROWS:
        rows = args[WRITE_ROWS[packet]]
        source = sum(tensor.nbytes for tensor in tensors_in(rows))
        index = sum(tensor.nbytes for tensor in tensors_in(args[1:])) - source
        # One number may be written to many rows.
        written = source or sum(tensor.nbytes for tensor in tensors_in(args[:1]))
        return index + 3 * written
    return sum(tensor.nbytes for tensor in tensors_in((args, result)))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def _attention_flops(func: Any, args: Any, products: int) -> float:
    """FLOPs of attention: half of all pairs where the kernel's own causal flag is set."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args))
    query = named["query"]
    key = named["key"]
    rows, heads, queries, width = query.shape
    pairs = queries * key.shape[2]
    if named.get("is_causal"):
        pairs /= 2
    return 2.0 * products * rows * heads * pairs * width


def _packed_flops(func: Any, args: Any, kwargs: Mapping[str, Any], products: int) -> float:
    """FLOPs of attention over rows that lie end to end, each to itself."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args)) | dict(kwargs)
    _, heads, width = named["query"].shape
    queries = named["cum_seq_q"].diff().tolist()
    keys = named["cum_seq_k"].diff().tolist()
    window = named.get("window_size_left")
    pairs = 0.0
    for row_queries, row_keys in zip(queries, keys, strict=True):
        seen = float(row_keys)
        if named.get("is_causal"):
            seen /= 2
        if window is not None and window >= 0:
            seen = min(seen, window + 1)
        pairs += row_queries * seen
    return 2.0 * products * heads * pairs * width


def _ranks(args: Any) -> list[int]:
    """Returns the ranks of the group that a collective is called with."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                group = dist.ProcessGroup.unbox(argument)
            except (RuntimeError, TypeError):
                continue
            return dist.get_process_group_ranks(group)
    return []


def _collective_bytes(name: str, args: Any, ranks: int) -> int:
    """Bytes that one rank sends in a collective: those of a ring, or to each other rank its own."""
    tensors = list(tensors_in(args[:2]))
    if not tensors:
        return 0
    largest = max(tensor.nbytes for tensor in tensors)
    if name.startswith("allreduce"):
        return 2 * largest * (ranks - 1) // ranks
    if name.startswith("broadcast"):
        return largest
    return largest * (ranks - 1) // ranks
