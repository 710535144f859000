"""Checks the settings of the engine, and the limits of engine=deepspeed.

DeepSpeed itself is not imported: that takes seconds, and the parent process never needs it.
"""

from collections.abc import Iterator

from torch import nn

from parallel.activation_offload import AT_HOME
from parallel.engines.base import OFFLOAD, SELECTIVE, Engine, unknown_offload
from parallel.engines.deepspeed_limits import STAGE, misfits, unstepped
from parallel.engines.optimizer_offload import STATE_AT_HOME
from trainer.config import instantiate
from trainer.config.finding import Finding, as_finding
from trainer.config.groups import CONF
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.files.limited_reader import yaml_file
from trainer.launch.elastic import machine_limits

ADAMW = "trainer.optim.adamw.AdamW"
MUON = "trainer.optim.muon.Muon"


def check_engine_settings(config: Config) -> Iterator[Finding]:
    """Checks that the engine exists and that the settings given to it are its own."""
    engine = config.engine
    if engine.target != _own_class(engine.name):
        # Only a user's own class is imported here; ours are known and may be slow to import.
        yield from check_engine_class(engine.target)
    if engine.checkpointing == "selective" and engine.compile:
        yield as_finding(SELECTIVE)
    yield from check_activation_offload(config)
    yield from check_optimizer_offload(config)
    yield from check_tiles(config)
    yield from check_head_groups(config)
    if engine.name == "deepspeed":
        yield from check_deepspeed(config)
    for key, value in engine.settings().items():
        owner = engine.owner(key)
        if value is not None and owner not in (None, engine.name):
            yield Finding(
                f"engine.{key}",
                value,
                f"is a setting of engine={owner}, but engine={engine.name}",
                f"use engine={owner}",
                causes=("engine.name",),
            )


def _own_class(name: str) -> str:
    """Returns the class that conf/engine/NAME.yaml names."""
    return yaml_file(CONF / "engine" / f"{name}.yaml")["_target_"]


def check_engine_class(target: str) -> Iterator[Finding]:
    """Checks that a class which no file of conf/engine names is an engine."""
    try:
        engine_class = instantiate.find_class(target, "engine")
    except UserError as error:
        yield as_finding(str(error))
        return
    if not issubclass(engine_class, Engine):
        yield Finding(
            "engine._target_",
            target,
            f"{engine_class.__name__} is no engine",
            "leave engine._target_ out, or name a class of that kind",
        )


def check_activation_offload(config: Config) -> Iterator[Finding]:
    """Refuses to move activations to the host's memory where no accelerator holds them."""
    if config.engine.offload_activations and _gpus(config) == 0:
        yield as_finding(AT_HOME)


def check_optimizer_offload(config: Config) -> Iterator[Finding]:
    """Checks what lies in the host's memory under our own engines."""
    offload = config.engine.offload or "none"
    if config.engine.name == "deepspeed" or offload == "none":
        return
    if offload not in OFFLOAD:
        yield as_finding(unknown_offload(offload))
        return
    if _gpus(config) == 0:
        yield as_finding(STATE_AT_HOME)
    if config.optim.target not in (ADAMW, MUON):
        name = config.optim.target.rpartition(".")[2]
        yield Finding(
            "engine.offload",
            offload,
            f"parameters are updated one after another, and {name} may need them together",
            "use optim=adamw or optim=muon, or engine.offload=none",
            causes=("optim",),
        )


def _gpus(config: Config) -> int | None:
    """Returns the GPUs that the ranks will find; None where nobody says."""
    # A batch job runs on other machines, which have the GPUs that it asks for.
    if config.launch.name == "slurm":
        return config.launch.gpus
    return machine_limits()[1]


def check_tiles(config: Config) -> Iterator[Finding]:
    """Refuses tiles of tokens where they are not proved exact."""
    engine = config.engine
    if engine.tile_tokens is None:
        return
    if engine.name == "deepspeed":
        yield Finding(
            "engine.tile_tokens",
            engine.tile_tokens,
            "DeepSpeed may gather and free weights around each tile, which is not proved exact",
            "use engine=fsdp, or engine.tile_tokens=null",
            causes=("engine.name",),
        )
    if engine.compile:
        yield Finding(
            "engine.tile_tokens",
            engine.tile_tokens,
            "blocks are compiled as a whole (engine.compile=true)",
            "use engine.compile=false, or engine.tile_tokens=null",
            causes=("engine.compile",),
        )


def check_head_groups(config: Config) -> Iterator[Finding]:
    """Refuses groups of heads where they would be computed otherwise than asked."""
    engine = config.engine
    if engine.head_groups is None:
        return
    key = "engine.head_groups", engine.head_groups
    if engine.name == "deepspeed":
        yield Finding(
            *key,
            "DeepSpeed may gather and free weights around each group, which is not proved exact",
            "use engine=fsdp, or engine.head_groups=null",
            causes=("engine.name",),
        )
    if engine.compile:
        yield Finding(
            *key,
            "blocks are compiled as a whole (engine.compile=true)",
            "use engine.compile=false, or engine.head_groups=null",
            causes=("engine.compile",),
        )
    if engine.checkpointing == "selective":
        yield Finding(
            *key,
            "each group is computed again in backward, and selective checkpointing keeps attention",
            "use engine.checkpointing=full, or engine.head_groups=null",
            causes=("engine.checkpointing",),
        )
    if config.parallel.time > 1:
        yield Finding(
            *key,
            "rows that are cut in time carry the keys of all heads from piece to piece",
            "use parallel.time=1, or engine.head_groups=null",
            causes=("parallel.time",),
        )
    ranks = _ranks_of_heads(config)
    each = config.model.heads // engine.head_groups
    if ranks > max(each, 1):
        yield Finding(
            *key,
            f"parallel.method={config.parallel.method} divides the heads of a group among {ranks}"
            f" ranks, and a group has {each}",
            f"use engine.head_groups={max(1, config.model.heads // ranks)} or fewer",
            causes=("parallel.method", "parallel.context", "model.heads"),
        )


def _ranks_of_heads(config: Config) -> int:
    """Returns among how many ranks a method divides the heads of an attention."""
    parallel = config.parallel
    if parallel.method == "ulysses":
        return parallel.context
    return parallel.ulysses or 1 if parallel.method == "usp" else 1


def check_deepspeed(config: Config) -> Iterator[Finding]:
    """Checks what DeepSpeed cannot do, from the config alone."""
    stage = _zero_stage(config)
    sentences = misfits(
        stage,
        config.engine.offload or "none",
        precision=config.precision,
        accelerator=machine_limits()[1] > 0,
        experts=config.parallel.experts,
        compile=config.engine.compile,
    )
    for sentence in sentences:
        yield as_finding(sentence)
    if stage and config.optim.target == MUON:
        yield Finding(
            "engine.zero_stage",
            stage,
            "DeepSpeed cuts parameters up into flat pieces, and optim=muon needs whole matrices",
            "use optim=adamw, or engine=fsdp, which gathers them",
            causes=("optim",),
        )


def check_deepspeed_model(config: Config, model: nn.Module) -> Iterator[Finding]:
    """Checks what DeepSpeed cannot do with the model that was built."""
    for sentence in unstepped(model, _zero_stage(config), config.parallel.context):
        yield as_finding(sentence)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            yield Finding(
                "engine",
                "deepspeed",
                f"{name} is a parameter without dims, which DeepSpeed cannot hold",
                "give it the shape [1], or use engine=fsdp",
            )


def _zero_stage(config: Config) -> int:
    if config.engine.zero_stage is None:
        return STAGE
    return config.engine.zero_stage
