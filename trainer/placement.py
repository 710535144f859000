"""Places the model of a config on the ranks of a mesh: what a run and its plan have in common."""

from dataclasses import dataclass

import torch
from torch import nn

from models.causality import plain_sight
from parallel.activation_offload import ActivationOffload
from parallel.collectives import Communicator
from parallel.engines.base import Engine
from parallel.engines.optimizer_offload import OptimizerOffload
from parallel.mesh import Mesh, build_mesh
from parallel.parallelize import parallelize
from parallel.tiles import tile_count
from trainer.config.instantiate import find_class, instantiate
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder


@dataclass(frozen=True)
class PlacedModel:
    """A model in training on one rank.

    Attributes:
        engine: holds the model, its gradients and the optimiser.
        communicator: of the drivers; None where neither rows nor experts are shared.
        share: cuts a batch into the micro-batches of this rank.
    """

    engine: Engine
    communicator: Communicator | None
    share: BatchSharder


def mesh_of(config: Config, device: torch.device | str = "cpu") -> Mesh:
    """Creates the process groups of a config. Collective: every rank calls it once."""
    parallel = config.parallel
    return build_mesh(
        parallel.context,
        parallel.data,
        ulysses=parallel.ulysses,
        ring=parallel.ring,
        experts=parallel.experts,
        replicas=config.engine.replicate or 1,
        device=device,
    )


def place(
    config: Config,
    mesh: Mesh,
    model: nn.Module,
    offload: ActivationOffload | None = None,
    optimizer_offload: OptimizerOffload | None = None,
) -> PlacedModel:
    """Parallelizes a model, initialises it and builds its optimiser.

    Args:
        config: of the run, or of one stage.
        mesh: the ranks.
        model: as built, best on the meta device.
        offload: takes activations to the host; None = pinned memory, where the config asks for it.
        optimizer_offload: the same of the optimiser's state.
    """
    share = BatchSharder(
        mesh,
        rows=config.rows,
        context_length=config.context_length,
        micro_batch=config.parallel.micro_batch,
        policy=config.parallel.layout,
        prefix=plain_sight(model),
        time=config.parallel.time,
    )
    kind = find_class(config.engine.target, "engine")
    settings = config.engine.arguments()
    optimiser = instantiate(config.optim, {}, "optim")
    engine = kind(mesh, optimiser, precision=config.precision, seed=config.seed, **settings)
    if config.engine.offload == "optimizer":
        engine.optimizer_offload = optimizer_offload
    if offload is None and config.engine.offload_activations:
        offload = ActivationOffload(mesh.device)
    tiles = None
    if config.engine.tile_tokens is not None:
        tiles = tile_count(share.micro_batch * share.tokens_per_rank, config.engine.tile_tokens)
    communicator = parallelize(
        model,
        engine,
        method=config.parallel.method,
        offload=offload,
        tiles=tiles,
        head_groups=config.engine.head_groups,
    )
    return PlacedModel(engine, communicator, share)
