"""The memory and traffic of a step on one rank: the loop of a run, taken without numbers.

The ranks are those of torch's fake process group, whose exchanges send nothing, so that one process
stands for any rank of any number of them. Every row is one document as long as the context, which
is the most that attention can be asked for.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from models.kernels.backends import TABLE
from parallel.mesh import Mesh
from trainer.config.build_model import build_model
from trainer.config.schema import Config
from trainer.data.batch_sharding import AUTO_TOKENS
from trainer.placement import mesh_of
from trainer.planning.changed_config import changed
from trainer.planning.devices import Device
from trainer.planning.live_memory import LiveMemory
from trainer.planning.rehearsal import Rehearsal
from trainer.planning.repeated_layers import (
    ENDS,
    Repetition,
    extended,
    find_repetition,
    keep_layers,
    places,
)
from trainer.planning.step_costs import StepCosts
from trainer.planning.watched_step import PlannedStretch, WatchedStep
from trainer.planning.without_numbers import fake_deepspeed
from trainer.planning.without_numbers.counted_kernels import counted_kernels
from trainer.planning.without_numbers.expected_pairs import expected_pairs
from trainer.planning.without_numbers.fake_arithmetic import FakeArithmetic
from trainer.planning.without_numbers.host_room import PlannedOffload, PlannedOptimizerOffload
from trainer.planning.without_numbers.quick_placement import placed_without_numbers

FEW = 2  # micro-batches that are rehearsed


@dataclass(frozen=True)
class StepPlan:
    """The cost of a step on one rank.

    Attributes:
        rank: which.
        peak_bytes: most bytes of tensors that are alive at once.
        by_kind: the same, by KINDS, at that moment. activations: kept by a forward for its
            backward. exchanges: what drivers receive. working: everything else, such as what is
            computed again.
        host_bytes: most bytes of activations and of the optimiser's state that are in the host's
            memory.
        sent_bytes: that the drivers send in a step, by kind of move.
        sent_over: the same, by (kind of move, slowest link that it takes).
        costs: FLOPs, seconds, and everything that is sent, by link.
    """

    rank: int
    peak_bytes: int
    by_kind: dict[str, int]
    host_bytes: int
    sent_bytes: dict[str, int]
    sent_over: dict[tuple[str, str], int]
    costs: StepCosts


def plan_step(
    config: Config, vocabulary: int, rank: int, device: Device, *, every_layer: bool = False
) -> StepPlan:
    """Plans a step of one rank; of compiled blocks as if they were not, which is more.

    Args:
        config: of the run; parallel.context x parallel.data ranks.
        vocabulary: tokens that the data has.
        rank: in the whole run.
        device: on which it runs.
        every_layer: plans every layer of a deep model, which gives the same
            (trainer/planning/repeated_layers.py) and takes longer.
    """
    # The compiler chooses with numbers what a block keeps: no more than the block does itself.
    config = changed(config, engine__compile=False)
    repetition = None
    # Buckets of DeepSpeed are filled across layers.
    if not every_layer and config.engine.name != fake_deepspeed.NAME:
        repetition = find_repetition(config, _meta_model(config, vocabulary))
    if repetition is not None:
        plans = []
        for times in (2 * ENDS, 2 * ENDS + 1):
            model = _meta_model(config, vocabulary)
            keep_layers(model, repetition, times)
            plans.append(_taken(config, model, rank, device))
        return _deep_plan(plans, repetition, rank)
    taken = _taken(config, _meta_model(config, vocabulary), rank, device)
    return _plan(rank, taken.stretches, taken.sent, taken.sent_over, taken.costs)


@dataclass(frozen=True)
class _TakenStep:
    """The sums of a step that was rehearsed; see StepPlan."""

    stretches: list[PlannedStretch]
    sent: dict[str, int]
    sent_over: Counter[tuple[str, str]]
    costs: StepCosts


def _meta_model(config: Config, vocabulary: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(config, vocabulary)


def _taken(config: Config, model: nn.Module, rank: int, device: Device) -> _TakenStep:
    """Takes a step of a model as one rank."""
    with fake_ranks(config, rank) as mesh, kernels_of(device), placed_without_numbers():
        config, pieces = _few_micro_batches(config, device)
        # The counter is outside: it sees what the engine allocates, not how that is faked.
        with FakeArithmetic(), LiveMemory() as live:
            costs = StepCosts(device, config.precision)
            pinned = device.kind == "cuda"
            offload = None
            if config.engine.offload_activations:
                offload = PlannedOffload(mesh.device, live, costs, pinned=pinned)
            moments = PlannedOptimizerOffload(mesh.device, live, costs, pinned=pinned)
            with _engine_without_numbers(config, live):
                rehearsal = Rehearsal(config, mesh, model, offload, moments)
                watched = WatchedStep(rehearsal, live, costs)
                with expected_pairs(costs, device), counted_kernels(costs, device):
                    watched.run()
            watched.count_pieces(pieces)
        return _TakenStep(watched.stretches(), watched.sent, watched.sent_over, costs)


def _deep_plan(plans: Sequence[_TakenStep], repetition: Repetition, rank: int) -> StepPlan:
    """Returns the plan of a model from those of two shallow ones; see repeated_layers."""
    fewer, more = plans
    times = repetition.times - 2 * ENDS
    first = repetition.first
    shallow = [
        places(plan.stretches, repetition, first + (2 * ENDS + added) * repetition.period)
        for added, plan in enumerate(plans)
    ]
    assert shallow[0].keys() == shallow[1].keys(), "layers that are alike take the same steps"
    stretches = [
        extended(stretch, shallow[1][place], times) for place, stretch in shallow[0].items()
    ]
    sent = {move: size + times * (more.sent[move] - size) for move, size in fewer.sent.items()}
    sent_over = Counter(
        {key: size + times * (more.sent_over[key] - size) for key, size in fewer.sent_over.items()}
    )
    costs = fewer.costs.copy()
    costs.add(more.costs, times)
    costs.add(fewer.costs, -times)
    return _plan(rank, stretches, sent, sent_over, costs)


def _plan(
    rank: int,
    stretches: Sequence[PlannedStretch],
    sent: dict[str, int],
    sent_over: Counter[tuple[str, str]],
    costs: StepCosts,
) -> StepPlan:
    fullest = max(stretches, key=lambda stretch: stretch.device_bytes)
    return StepPlan(
        rank=rank,
        peak_bytes=fullest.device_bytes,
        by_kind=fullest.by_kind,
        host_bytes=max(stretch.host_bytes for stretch in stretches),
        sent_bytes=sent,
        sent_over=dict(sent_over),
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


def _engine_without_numbers(config: Config, live: LiveMemory) -> AbstractContextManager[None]:
    """Returns what stands around an engine that has ways of its own with tensors."""
    if config.engine.name == fake_deepspeed.NAME:
        return fake_deepspeed.deepspeed_without_numbers(live)
    return nullcontext()


@contextmanager
def kernels_of(device: Device) -> Iterator[None]:
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
def fake_ranks(config: Config, rank: int) -> Iterator[Mesh]:
    """Makes this process one of the ranks of a config, the others of which are not there."""
    ranks = config.parallel.ranks
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield mesh_of(config)
    finally:
        dist.destroy_process_group()
        # It holds meshes of the ranks that are gone, which equal those of the next plan.
        _clear_sharding_prop_cache()
