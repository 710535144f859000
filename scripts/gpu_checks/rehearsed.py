"""Real steps of a config on the device of a check, by the training loop, without data or files."""

import gc
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engines import materialize
from parallel.mesh import Mesh, build_mesh
from trainer.config.build_model import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.planning.rehearsal import Rehearsal

VOCABULARY = 257


def config_of(words: Sequence[str]) -> Config:
    """Returns the config of some overrides.

    Raises:
        ValueError: there is none.
    """
    composed = compose([*words, "launch.force=true"])
    if composed.config is None:
        raise ValueError("\n".join(composed.faults))
    return composed.config


def rehearse(config: Config, device: torch.device) -> Rehearsal:
    """Returns a run of one rank on a device, without a process group unless the engine wants one.

    Initial weights are drawn on the device, of another distribution than a run's: the processor
    takes minutes for those of a large model, and neither time nor memory depends on them.
    """
    with torch.device("meta"):
        model = build_model(config, VOCABULARY)
    mesh = Mesh.alone(device) if config.engine.name == "single" else _mesh_of_one(device)
    with _quick_weights(device):
        return Rehearsal(config, mesh, model)


def seconds_of_a_step(rehearsal: Rehearsal, device: torch.device) -> float:
    """Takes a step and waits for the device."""
    _wait(device)
    began = time.perf_counter()
    rehearsal.step()
    _wait(device)
    return time.perf_counter() - began


def peak_of_a_step(rehearsal: Rehearsal, device: torch.device) -> int | None:
    """Takes a step; returns the most bytes of tensors that were alive, None on a CPU."""
    gc.collect()
    if device.type != "cuda":
        rehearsal.step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    rehearsal.step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def free(device: torch.device) -> None:
    """Gives back what no tensor holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _mesh_of_one(device: torch.device) -> Mesh:
    if not dist.is_initialized():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=0, world_size=1)
    return build_mesh(1, 1, device=device)


@contextmanager
def _quick_weights(device: torch.device) -> Iterator[None]:
    plain = materialize.draw

    def quick(rule: Any, name: str, shape: torch.Size, seed: int) -> Tensor:
        if len(shape) < 2:
            return plain(rule, name, shape, seed)
        return torch.empty(shape, device=device).normal_(std=0.02)

    materialize.draw = quick
    try:
        yield
    finally:
        materialize.draw = plain
