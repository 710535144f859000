"""The memory and traffic of a step on one rank: the loop of a run, taken without numbers.

The ranks are those of torch's fake process group, whose exchanges send nothing, so that one process
stands for any rank of any number of them. Every row is one document as long as the context, which
is the most that attention can be asked for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.block import Block
from models.kernels.backends import TABLE
from parallel.collectives import Communicator
from parallel.mesh import Mesh, build_mesh
from parallel.tiles import LOSSES
from trainer.config.build_model import build_model
from trainer.config.schema import Config
from trainer.data.batch_sharding import AUTO_TOKENS
from trainer.planning.changed_config import changed
from trainer.planning.devices import Device
from trainer.planning.fake_arithmetic import FakeArithmetic
from trainer.planning.inside_operations import bytes_inside
from trainer.planning.live_memory import LiveMemory
from trainer.planning.rehearsal import Rehearsal
from trainer.planning.step_costs import StepCosts

STATE_KINDS = ("weights", "gathered weights", "gradients", "optimiser")
PARTS = ("mixers", "feed-forward layers", "losses", "the rest")
EXCHANGE = "exchanges"
WORKING = "working"
FEW = 2  # micro-batches that are rehearsed
KINDS = (
    *STATE_KINDS,
    *(f"activations of {part}" for part in PARTS),
    EXCHANGE,
    WORKING,
)


@dataclass(frozen=True)
class StepPlan:
    """The cost of a step on one rank.

    Attributes:
        rank: which.
        peak_bytes: most bytes of tensors that are alive at once.
        by_kind: the same, by KINDS, at that moment. activations: kept by a forward for its
            backward. exchanges: what drivers receive. working: everything else, such as what is
            computed again.
        sent_bytes: that the drivers send in a step, by kind of move.
        costs: FLOPs, seconds, and everything that is sent, by link.
    """

    rank: int
    peak_bytes: int
    by_kind: dict[str, int]
    sent_bytes: dict[str, int]
    costs: StepCosts


def plan_step(config: Config, vocabulary: int, rank: int, device: Device) -> StepPlan:
    """Plans a step of one rank.

    Args:
        config: of the run; parallel.context x parallel.data ranks.
        vocabulary: tokens that the data has.
        rank: in the whole run.
        device: on which it runs.
    """
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    with fake_ranks(config, rank) as mesh, _kernels_of(device):
        config, pieces = _few_micro_batches(config, device)
        # The counter is outside: it sees what the engine allocates, not how that is faked.
        with FakeArithmetic(), LiveMemory() as live:
            costs = StepCosts(device, config.precision)
            watched = _WatchedStep(Rehearsal(config, mesh, model), live, costs)
            watched.run()
            watched.count_pieces(pieces)
            return StepPlan(
                rank=rank,
                peak_bytes=live.peak,
                by_kind=watched.by_kind(),
                sent_bytes=watched.sent,
                costs=costs,
            )


def _few_micro_batches(config: Config, device: Device) -> tuple[Config, int]:
    """Returns the config with at most FEW micro-batches, and how many there are in truth.

    Those after the first are alike: they find the sums of the gradients there.
    """
    parallel = config.parallel
    rows = -(-config.rows // parallel.data)
    micro_batch = parallel.micro_batch
    if micro_batch == "auto":
        tokens = -(-config.context_length // (parallel.context * parallel.time))
        micro_batch = max(1, AUTO_TOKENS[device.kind] // tokens)
    micro_batch = min(micro_batch, rows)
    pieces = -(-rows // micro_batch)
    if config.memory.carries or pieces <= FEW:
        return changed(config, parallel__micro_batch=micro_batch), pieces
    tokens = FEW * micro_batch * parallel.data * config.context_length
    return changed(config, parallel__micro_batch=micro_batch, batch_tokens=tokens), pieces


@dataclass
class _WatchedStep:
    """A step whose allocations are sorted by what they are for."""

    rehearsal: Rehearsal
    live: LiveMemory
    costs: StepCosts
    gradients: set[int] = field(default_factory=set)
    forwards: list[tuple[int, int]] = field(default_factory=list)
    began: int | None = None
    after_first: StepCosts | None = None

    def __post_init__(self) -> None:
        engine = self.rehearsal.placement.engine
        self.weights = self._numbers([*engine.parameters.values(), *engine.model.parameters()])
        states = [value for state in engine.optimiser.state.values() for value in state.values()]
        self.optimiser = self._numbers(value for value in states if isinstance(value, Tensor))

    def run(self) -> None:
        rehearsal = self.rehearsal
        if rehearsal.config.memory.carries:
            # The first rows find nothing that earlier ones left.
            rehearsal.step()
        communicator = rehearsal.placement.communicator
        if communicator is not None:
            communicator.bytes_sent.clear()
        rehearsal.loop.heartbeat = self._enter_phase
        self.live.restart()
        self.live.observe = self._observe
        with _labels(rehearsal.placement.engine.model, self.live), _exchanges(self.live):
            rehearsal.step()
        self.sent = {} if communicator is None else dict(communicator.bytes_sent)

    def _observe(self, func: Any, args: Any, result: Any) -> None:
        self.costs.note(func, args, result)
        if self.costs.device.kind == "cpu":
            threads = torch.get_num_threads() // self.rehearsal.mesh.world.size
            inside = bytes_inside(func, args, max(1, threads))
            if inside:
                self.live.hold_for_a_moment(inside)

    def count_pieces(self, pieces: int) -> None:
        """Adds the micro-batches that were left out, which are as the first."""
        taken = self.rehearsal.placement.share.pieces
        if self.after_first is not None and pieces > taken:
            self.costs.add(self.after_first, pieces - taken)
            self.sent = {move: size // taken * pieces for move, size in self.sent.items()}

    def by_kind(self) -> dict[str, int]:
        """Returns the bytes at the peak by KINDS."""
        found = dict.fromkeys(KINDS, 0)
        for number, allocation in self.live.at_peak():
            found[self._kind(number, allocation)] += allocation.size
        return found

    def _kind(self, number: int, allocation: Any) -> str:
        for name, own in (
            ("weights", self.weights),
            ("optimiser", self.optimiser),
            ("gradients", self.gradients),
        ):
            if number in own:
                return name
        if allocation.resized:
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
def _kernels_of(device: Device) -> Iterator[None]:
    """Has attention served by the kernels of a device, whose tensors are said to be the CPU's."""
    plain = dict(TABLE)
    if device.kind == "cuda":
        for kind, dtype in plain:
            if kind == "cpu":
                TABLE.pop((kind, dtype))
        TABLE.update(
            {("cpu", dtype): plain["cuda", dtype] for kind, dtype in plain if kind == "cuda"}
        )
    try:
        yield
    finally:
        TABLE.clear()
        TABLE.update(plain)


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


@contextmanager
def _exchanges(live: LiveMemory) -> Iterator[None]:
    """Notes with allocations that a communicator made them."""
    names = ("ring_shift", "all_to_all", "send", "recv")
    plain = {name: getattr(Communicator, name) for name in names}

    def watched(move: Any) -> Any:
        def labelled(*args: Any, **kwargs: Any) -> Any:
            with live.labelled(EXCHANGE):
                return move(*args, **kwargs)

        return labelled

    for name, move in plain.items():
        setattr(Communicator, name, watched(move))
    try:
        yield
    finally:
        for name, move in plain.items():
            setattr(Communicator, name, move)


@contextmanager
def fake_ranks(config: Config, rank: int) -> Iterator[Mesh]:
    """Makes this process one of the ranks of a config, the others of which are not there."""
    parallel = config.parallel
    dist.init_process_group("fake", rank=rank, world_size=parallel.ranks, store=FakeStore())
    try:
        yield build_mesh(
            parallel.context,
            parallel.data,
            ulysses=parallel.ulysses,
            ring=parallel.ring,
            experts=parallel.experts,
            replicas=config.engine.replicate or 1,
        )
    finally:
        dist.destroy_process_group()
