"""Watches a step that is rehearsed: what it holds at every moment, sorted by what it is for."""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models import loss
from models.block import Block
from parallel.collectives import Communicator
from parallel.engines.base import blocks_of
from parallel.tiles import LOSSES
from trainer.planning.inside_operations import bytes_inside
from trainer.planning.live_memory import Allocation, LiveMemory
from trainer.planning.rehearsal import Rehearsal
from trainer.planning.step_costs import StepCosts
from trainer.planning.without_numbers import fake_deepspeed

STATE_KINDS = ("weights", "gathered weights", "gradients", "optimiser")
PARTS = ("mixers", "feed-forward layers", "losses", "the rest")
EXCHANGE = "exchanges"
WORKING = "working"
HOST = "host"
FEW_CHUNKS = 3
KINDS = (
    *STATE_KINDS,
    *(f"activations of {part}" for part in PARTS),
    EXCHANGE,
    WORKING,
)


class Mark(NamedTuple):
    """A moment of a step: how many allocations it had made, and what began.

    Attributes:
        allocations: their number.
        event: what began, such as "forward" or "gradient norm and optimiser".
        block: the layer that it is of; None where it is of none.
    """

    allocations: int
    event: str
    block: int | None = None


class PlannedStretch(NamedTuple):
    """Memory that a step held at most between two marks.

    Attributes:
        event, block: of the mark that begins it.
        by_kind: bytes at the fullest moment, by KINDS.
        host_bytes: most bytes that waited on the host.
    """

    event: str
    block: int | None
    by_kind: dict[str, int]
    host_bytes: int

    @property
    def device_bytes(self) -> int:
        """Bytes on the device at the fullest moment."""
        return sum(self.by_kind.values())


@dataclass
class WatchedStep:
    """A step whose allocations are sorted by what they are for.

    Attributes:
        sent: bytes that the drivers send, by kind of move.
        sent_over: the same, by (kind of move, link).
    """

    rehearsal: Rehearsal
    live: LiveMemory
    costs: StepCosts
    gradients: set[int] = field(default_factory=set)
    forwards: list[tuple[int, int]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)
    sent_over: Counter[tuple[str, str]] = field(default_factory=Counter)
    began: int | None = None
    after_first: StepCosts | None = None

    def __post_init__(self) -> None:
        self.weights: set[int] = set()
        self.optimiser: set[int] = set()
        self._note_state()

    def _note_state(self) -> None:
        """Notes where weights and the optimiser's state lie now."""
        engine = self.rehearsal.placement.engine
        weights = [*engine.parameters.values(), *engine.model.parameters()]
        self.weights |= self._numbers([*weights, *fake_deepspeed.sharded_weights(engine)])
        states = [value for state in engine.optimiser.state.values() for value in state.values()]
        self.optimiser |= self._numbers(value for value in states if isinstance(value, Tensor))

    def run(self) -> None:
        """Takes the step."""
        rehearsal = self.rehearsal
        config = rehearsal.config
        if config.memory.carries or config.engine.name == fake_deepspeed.NAME:
            # The first rows find nothing that earlier ones left; and DeepSpeed gathers ahead what
            # it has seen gathered in a step before.
            rehearsal.step()
        communicator = rehearsal.placement.communicator
        if communicator is not None:
            communicator.bytes_sent.clear()
        rehearsal.loop.heartbeat = self._enter_phase
        self.live.observe = self._observe
        self._mark("the beginning")
        model = rehearsal.placement.engine.model
        with _labels(model, self.live), self._blocks(model), self._moves(), self._few_chunks():
            rehearsal.step()
        # FSDP2 moves shards that are shorter than others into padded ones as a forward begins.
        self._note_state()
        self.sent = {} if communicator is None else dict(communicator.bytes_sent)

    def count_pieces(self, pieces: int) -> None:
        """Adds the micro-batches that were left out, which are as the first."""
        taken = self.rehearsal.placement.share.pieces
        if self.after_first is not None and pieces > taken:
            self.costs.add(self.after_first, pieces - taken)
            self.sent = {move: size // taken * pieces for move, size in self.sent.items()}
            for key, size in self.sent_over.items():
                self.sent_over[key] = size // taken * pieces

    def stretches(self) -> list[PlannedStretch]:
        """Returns what was held between each mark and the next, in their order."""
        history = self.live.history
        # held[k, n]: bytes of kind k that are alive once allocation n is made.
        changes = torch.zeros(len(KINDS) + 1, len(history) + 1, dtype=torch.int64)
        kinds = []
        for number, allocation in enumerate(history):
            kind = self._kind(number, allocation)
            kinds.append(len(KINDS) if kind == HOST else KINDS.index(kind))
        sizes = torch.tensor([allocation.size for allocation in history], dtype=torch.int64)
        last = len(history)
        ends = torch.tensor([last if a.ended is None else a.ended + 1 for a in history])
        rows = torch.tensor(kinds)
        changes.index_put_((rows, torch.arange(last)), sizes, accumulate=True)
        changes.index_put_((rows, ends), -sizes, accumulate=True)
        held = changes.cumsum(1)[:, :last]
        on_device = held[:-1].sum(0)
        found = []
        until = [mark.allocations for mark in self.marks[1:]] + [last]
        for mark, end in zip(self.marks, until, strict=True):
            # What is alive when it begins counts, though no allocation may follow.
            start = max(0, mark.allocations - 1)
            stop = max(end, start + 1)
            moment = start + int(on_device[start:stop].argmax())
            by_kind = dict(zip(KINDS, held[:-1, moment].tolist(), strict=True))
            host_bytes = int(held[-1, start:stop].max())
            found.append(PlannedStretch(mark.event, mark.block, by_kind, host_bytes))
        return found

    def _observe(self, func: Any, args: Any, result: Any, kwargs: Any) -> None:
        self.costs.note(func, args, result, kwargs)
        if self.costs.device.kind == "cpu":
            threads = torch.get_num_threads() // self.rehearsal.mesh.world.size
            inside = bytes_inside(func, args, max(1, threads))
            if inside:
                self.live.hold_for_a_moment(inside)

    def _mark(self, event: str, block: int | None = None) -> None:
        self.marks.append(Mark(len(self.live.history), event, block))

    def _kind(self, number: int, allocation: Allocation) -> str:
        if allocation.label == HOST:
            return HOST
        for name, own in (
            ("weights", self.weights),
            ("optimiser", self.optimiser),
            ("gradients", self.gradients),
        ):
            if number in own:
                return name
        if allocation.resized or allocation.label == fake_deepspeed.GATHERED:
            return "gathered weights"
        for began, ended in self.forwards:
            outlives = allocation.ended is None or allocation.ended >= ended
            if began <= number < ended and outlives:
                part = allocation.label if allocation.label in PARTS else PARTS[-1]
                return f"activations of {part}"
        return EXCHANGE if allocation.label == EXCHANGE else WORKING

    def _enter_phase(self, phase: str, step: int) -> None:
        """Notes where forwards begin and end, and the gradients once they are whole."""
        here = len(self.live.history)
        self._mark(phase)
        if phase == "forward of micro-batch 2":
            self.after_first = self.costs.copy()
        if phase.startswith("forward"):
            self.began = here
        elif self.began is not None:
            self.forwards.append((self.began, here))
            self.began = None
        if phase.startswith("gradient norm"):
            engine = self.rehearsal.placement.engine
            weights = [*engine.parameters.values(), *engine.model.parameters()]
            grads = [weight.grad for weight in weights if weight.grad is not None]
            self.gradients = self._numbers(grads)

    def _numbers(self, tensors: Iterable[Tensor]) -> set[int]:
        numbers = {self.live.number_of(tensor) for tensor in tensors}
        return {number for number in numbers if number is not None}

    @contextmanager
    def _blocks(self, model: nn.Module) -> Iterator[None]:
        """Marks where the layers' forwards and backwards begin."""
        handles = []

        def watch(block: nn.Module, index: int) -> None:
            def enter(*_: Any) -> None:
                self._mark("forward", index)

            def leave(_module: Any, _args: Any, result: Any) -> None:
                self._mark("behind", index)
                first = result[0] if isinstance(result, tuple) else result
                if first.requires_grad:
                    first.register_hook(lambda _: self._mark("backward", index))

            handles.append(block.register_forward_pre_hook(enter))
            handles.append(block.register_forward_hook(leave))

        for index, block in enumerate(blocks_of(model)):
            watch(block, index)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def _moves(self) -> Iterator[None]:
        """Notes with allocations that a communicator made them, and over which link it sends."""
        names = ("ring_shift", "start_all_to_all", "send", "recv", "count_bytes")
        plain = {name: getattr(Communicator, name) for name in names}
        peers: list[int] = []  # in the group, of the move at hand; none: all of the group

        def watched(name: str, move: Any) -> Any:
            def labelled(communicator: Communicator, *args: Any, **kwargs: Any) -> Any:
                if name == "ring_shift":
                    peers.append((communicator.rank + 1) % communicator.size)
                elif name == "send":
                    peers.append(kwargs["to"] if "to" in kwargs else args[1])
                try:
                    with self.live.labelled(EXCHANGE):
                        return move(communicator, *args, **kwargs)
                finally:
                    peers.clear()

            return labelled

        def count_bytes(communicator: Communicator, move: str, size: int) -> None:
            to = peers or range(communicator.size)
            ranks = [dist.get_global_rank(communicator.group, rank) for rank in to]
            self.sent_over[move, self.costs.link_to(ranks)] += size
            plain["count_bytes"](communicator, move, size)

        for name, move in plain.items():
            setattr(Communicator, name, watched(name, move))
        setattr(Communicator, "count_bytes", count_bytes)  # noqa: B010
        try:
            yield
        finally:
            for name, move in plain.items():
                setattr(Communicator, name, move)

    @contextmanager
    def _few_chunks(self) -> Iterator[None]:
        """Takes the first, the second and the last chunk of losses; others are as the second."""
        every = loss.chunk_starts

        def few(tokens: int, step: int) -> Iterator[int]:
            starts = [*every(tokens, step)]
            if len(starts) <= FEW_CHUNKS:
                yield from starts
                return
            yield starts[0]
            before = self.costs.copy()
            yield starts[1]
            after = self.costs.copy()
            left_out = len(starts) - FEW_CHUNKS
            self.costs.add(after, left_out)
            self.costs.add(before, -left_out)
            yield starts[-1]

        loss.chunk_starts = few
        try:
            yield
        finally:
            loss.chunk_starts = every


@contextmanager
def _labels(model: nn.Module, live: LiveMemory) -> Iterator[None]:
    """Notes with allocations whether a mixer, a feed-forward layer or the losses made them."""
    handles = []
    before: list[str] = []

    def watch(module: nn.Module, label: str) -> None:
        def enter(*_: Any) -> None:
            before.append(live.label)
            live.label = label

        def leave(*_: Any) -> None:
            live.label = before.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))

    for module in model.modules():
        if isinstance(module, Block):
            watch(module.mixer, PARTS[0])
            watch(module.feedforward, PARTS[1])
    losses = getattr(model, LOSSES, None)
    if losses is not None:

        def labelled_losses(*args: Any, **kwargs: Any) -> Any:
            with live.labelled(PARTS[2]):
                return losses(*args, **kwargs)

        setattr(model, LOSSES, labelled_losses)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        if losses is not None:
            setattr(model, LOSSES, losses)
