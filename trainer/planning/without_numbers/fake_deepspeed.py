"""Has DeepSpeed place and train a model whose tensors hold no numbers.

Its own code runs, so that buckets, shards and exchanges of a plan are its own. What it asks of
numbers or of the graph of a backward pass is answered here: no gradient overflows, and every
parameter that is trained is used.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.engines.base import Engine
from trainer.planning.live_memory import LiveMemory

NAME = "deepspeed"
GATHERED = "gathered weights"
# That it asks the environment for: the number of a rank on its machine, and what it computes on.
ASKED = {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}


@contextmanager
def deepspeed_without_numbers(live: LiveMemory) -> Iterator[None]:
    """Makes DeepSpeed run on tensors without numbers, as long as it lasts.

    Args:
        live: is told which allocations are gathered weights.
    """
    answered = [name for name in ASKED if name not in os.environ]
    for name in answered:
        os.environ[name] = ASKED[name]
    try:
        changes = [*_changes(live), *_forgotten()]
        plain = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
        try:
            for owner, name, stand_in in changes:
                setattr(owner, name, stand_in)
            with warnings.catch_warnings():
                # It asks whether an address is a multiple of 4; that of no number is 0.
                message = "Accessing the data pointer of FakeTensor"
                warnings.filterwarnings("ignore", message=message)
                yield
        finally:
            for owner, name, own in plain:
                setattr(owner, name, own)
    finally:
        for name in answered:
            del os.environ[name]


def _changes(live: LiveMemory) -> list[tuple[Any, str, Any]]:
    """Returns (owner, name, what stands there for a plan)."""
    # Only where a plan asks for it: it takes seconds, and need not be installed.
    accelerator = import_module("deepspeed.accelerator.real_accelerator")
    on_cpu = import_module("deepspeed.accelerator.cpu_accelerator").CPU_Accelerator()
    runtime = "deepspeed.runtime"
    utils = import_module(f"{runtime}.utils")
    zero_utils = import_module(f"{runtime}.zero.utils")
    bf16_optimizer = import_module(f"{runtime}.bf16_optimizer")
    stage_1_and_2 = import_module(f"{runtime}.zero.stage_1_and_2")
    stage3 = import_module(f"{runtime}.zero.stage3")
    coordinator = import_module(f"{runtime}.zero.partitioned_param_coordinator")
    coordinator = coordinator.PartitionedParameterCoordinator
    fetch = coordinator.fetch_sub_module

    def fetch_labelled(*args: Any, **options: Any) -> Any:
        with live.labelled(GATHERED):
            return fetch(*args, **options)

    changes: list[tuple[Any, str, Any]] = [
        (nn.Module, "_apply", _apply_to_data),
        # Tensors of a plan are said to be the CPU's, whatever this machine has.
        (accelerator, "ds_accelerator", on_cpu),
        (stage3, "count_used_parameters_in_backward", _count_all),
        # Ranks that are not there agree.
        (zero_utils, "get_lst_from_rank0", list),
        (zero_utils, "assert_lst_len_same_as_other_ranks", _say_nothing),
        (bf16_optimizer, "see_memory_usage", _say_nothing),
        (coordinator, "fetch_sub_module", fetch_labelled),
    ]
    for module in (utils, bf16_optimizer, stage3, stage_1_and_2):
        changes.append((module, "is_invalid_grad_norm", _is_valid))
    for kind in (stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3):
        changes.append((kind, "has_overflow", _never(kind.has_overflow)))
    return changes


def _forgotten() -> list[tuple[Any, str, Any]]:
    """As `_changes`: what it remembers of process groups, which are others in each plan."""
    comm = import_module("deepspeed.comm.comm")
    groups = import_module("deepspeed.utils.groups")
    found: list[tuple[Any, str, Any]] = [(comm, "cdb", None)]
    for name, value in vars(groups).items():
        if value is None or isinstance(value, dist.ProcessGroup):
            found.append((groups, name, None))
        elif isinstance(value, dict) and not name.startswith("__"):
            found.append((groups, name, {}))
    return found


def sharded_weights(engine: Engine) -> Iterable[Tensor]:
    """Yields what DeepSpeed keeps of weights beside parameters: shards and float32 masters."""
    for parameter in engine.parameters.values():
        shard = getattr(parameter, "ds_tensor", None)
        if shard is not None:
            yield shard
    if getattr(engine, "zero_stage", 0):
        yield from getattr(engine, "_shards")().values()  # noqa: B009


@torch.no_grad()
def _apply_to_data(module: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
    """As nn.Module._apply, which would exchange tensors themselves and cannot without numbers."""
    tensors = [*module.parameters(recurse), *module.buffers(recurse)]
    for tensor in dict.fromkeys(tensors):
        changed = fn(tensor)
        if changed is not tensor:
            tensor.data = changed
    return module


def _never(has_overflow: Any) -> Any:
    """Returns what looks for an overflow, which costs what it costs, and finds none."""

    def look(optimiser: Any, *args: Any, **options: Any) -> bool:
        has_overflow(optimiser, *args, **options)
        return False

    return look


def _is_valid(norm: Any) -> bool:
    return False


def _say_nothing(*args: Any, **options: Any) -> None:
    """Stands for what prints, or asks other ranks."""


def _count_all(parameters: Sequence[Any]) -> int:
    return sum(parameter.requires_grad for parameter in parameters)
