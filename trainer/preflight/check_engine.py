"""What engine=deepspeed cannot honour, asked by the check before any rank starts; DeepSpeed itself
is not imported."""

import importlib.util
from collections.abc import Iterator

from torch import nn

from parallel.activation_offload import AT_HOME
from parallel.engines.base import SELECTIVE, Engine
from parallel.engines.deepspeed_limits import STAGE, misfits, unstepped
from trainer.config import instantiate
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.launch.elastic import machine_limits


def check_replicas(config: Config) -> Iterator[str]:
    """Activations that are to wait in the host's memory, and are there already. A batch job has the
    GPUs that it asks for."""
    gpus = config.launch.gpus if config.launch.name == "slurm" else machine_limits()[1]
    if config.engine.offload_activations and gpus == 0:
        yield AT_HOME


ENGINES = {
    name: f"parallel.engines.{name}.{name.capitalize()}" for name in ("single", "fsdp", "deepspeed")
}
MUON = "trainer.optim.muon.Muon"


def check_deepspeed(config: Config) -> Iterator[str]:
    """Of the config alone."""
    asked = config.engine
    yield from misfits(
        _stage(config),
        asked.offload or "none",
        precision=config.precision,
        accelerator=machine_limits()[1] > 0,
        experts=config.parallel.experts,
        compile=asked.compile,
    )
    if _stage(config) and config.optim.target == MUON:
        yield (
            f"optim=muon with engine.zero_stage={_stage(config)}: DeepSpeed cuts parameters up into"
            " flat pieces, and Muon needs whole matrices; use optim=adamw, or engine=fsdp, which"
            " gathers them"
        )


def check_deepspeed_model(config: Config, model: nn.Module) -> Iterator[str]:
    """Of the built model."""
    yield from unstepped(model, _stage(config), config.parallel.context)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            yield (
                f"engine=deepspeed: {name} is a parameter without dims, which DeepSpeed cannot"
                " hold; give it the shape [1], or use engine=fsdp"
            )


def _stage(config: Config) -> int:
    return STAGE if config.engine.zero_stage is None else config.engine.zero_stage


def check_engine_settings(config: Config) -> Iterator[str]:
    """Whether the engine is there and its settings are its own."""
    asked = config.engine
    there = importlib.util.find_spec(asked.target.rpartition(".")[0] or asked.target)
    if there is None:
        yield f"engine={asked.name} is not built yet; use engine=fsdp"
    elif asked.target != ENGINES[asked.name]:  # a user's own; ours may be slow to import
        yield from check_engine_class(asked.target)
    if asked.checkpointing == "selective" and asked.compile:
        yield SELECTIVE
    yield from check_replicas(config)
    if asked.name == "deepspeed":
        yield from check_deepspeed(config)
    for key, value, owner in (
        ("zero_stage", asked.zero_stage, "deepspeed"),
        ("offload", asked.offload, "deepspeed"),
        ("reshard_after_forward", asked.reshard_after_forward, "fsdp"),
        ("replicate", asked.replicate, "fsdp"),
    ):
        if value is not None and asked.name != owner:
            shown = str(value).lower()
            yield (
                f"engine.{key}={shown} is a setting of engine={owner}, but engine={asked.name}; use"
                f" engine={owner}"
            )


def check_engine_class(target: str) -> Iterator[str]:
    """Whether a class that no yaml of conf/engine names is an engine."""
    try:
        kind = instantiate.find_class(target, "engine")
    except UserError as fault:
        yield str(fault)
        return
    if not issubclass(kind, Engine):
        yield (
            f"engine._target_={target}: {kind.__name__} is no engine; leave engine._target_ out, or"
            " name a class of that kind"
        )
