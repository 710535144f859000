"""Wishes that would be dropped without a word, because the model or the data has no place for them: each is a fault."""

from collections.abc import Iterator

from torch import nn

from models.convolution.hyena import Hyena
from parallel.engines.engine import blocks_of
from parallel.launch import machine
from parallel.offload import AT_HOME
from trainer import build, slurm
from trainer.config import Config, Fault, Launch
from trainer.data.sources import build as build_source
from trainer.data.tasks.task import Task
from trainer.generate import beginning
from trainer.values import shown

NAME_BYTES = 255  # of the usual file systems
PATH_BYTES = 4095
MEETING = ("nodes", "node_rank", "endpoint", "address")


def meeting(config: Config) -> Iterator[str]:
    """Several machines that could not find each other, or that are told of a meeting that does not take place."""
    wish, ranks = config.launch, config.parallel.ranks
    for key in (key for key in (*MEETING, *slurm.KEYS) if getattr(wish, key) != getattr(Launch(), key)):
        if key in MEETING and wish.name != "multinode" and (key, wish.name) != ("nodes", "slurm"):
            yield f"launch.{key}={getattr(wish, key)} is for several machines, but launch={wish.name}; use launch=multinode"
        if key in slurm.KEYS and wish.name != "slurm":
            yield f"launch.{key}={getattr(wish, key)} is for a batch job, but launch={wish.name}; use launch=slurm"
    if wish.name != "multinode":
        return
    host, _, port = (wish.endpoint or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        yield f"launch.endpoint={wish.endpoint or 'null'}: machines meet at HOST:PORT of the first; for example node0:29500"
    if wish.node_rank is None or wish.node_rank >= wish.nodes:
        shown = "null" if wish.node_rank is None else wish.node_rank
        yield f"launch.node_rank={shown}: give each of the {wish.nodes} machines a number from 0 to {wish.nodes - 1}"
    if ranks % wish.nodes:
        yield f"{ranks} ranks do not divide among launch.nodes={wish.nodes} machines; change parallel.data or launch.nodes"
    if config.run_dir is None:
        yield "run_dir=null: the machines could not find their run; give run_dir=PATH, a folder that all of them see"


def unplaced(config: Config) -> Iterator[str]:
    """Layers that were asked for of a model that takes none."""
    try:
        places = {place: build.takes(config, place) for place in ("mixers", "feedforwards")}
    except Fault:  # there is no such class, which is said elsewhere
        return
    asked, kind = config.model, config.model.target.rpartition(".")[2]
    for key, wish, place in (
        ("mixer", config.mixer, "mixers"),
        ("model.pattern", asked.pattern, "mixers"),
        ("model.mixers", asked.mixers, "mixers"),
        ("model.feedforward", asked.feedforward, "feedforwards"),
        ("model.feedforward_pattern", asked.feedforward_pattern, "feedforwards"),
        ("model.feedforwards", asked.feedforwards, "feedforwards"),
    ):
        if wish and not places[place]:
            yield f"{key} is set, but {kind} takes no {place}; leave {key} out, or use a decoder, for example model=full"


def whole_only(config: Config, model: nn.Module) -> Iterator[str]:
    """What is done block by block, of a model that has no blocks."""
    if blocks_of(model):
        return
    kind, engine = type(model).__name__, config.engine
    if engine.checkpointing != "none":
        yield (
            f"engine.checkpointing={engine.checkpointing} computes blocks again, and {kind} has none; "
            "use engine.checkpointing=none"
        )
    if engine.compile:
        yield f"engine.compile=true compiles blocks, and {kind} has none; use engine.compile=false"
    if engine.offload_activations:
        yield (
            f"engine.offload_activations=true sends away what blocks save, and {kind} has none; "
            "use engine.offload_activations=false"
        )


def homeless(config: Config) -> Iterator[str]:
    """Activations that are to wait in the host's memory, and are there already. A batch job has the GPUs that it asks for."""
    gpus = config.launch.gpus if config.launch.name == "slurm" else machine()[1]
    if config.engine.offload_activations and gpus == 0:
        yield AT_HOME


def too_short(config: Config, model: nn.Module) -> Iterator[str]:
    """A sample that is longer than what a layer of the model can take."""
    wish = config.evaluation
    if not wish.every or not wish.generate:
        return
    try:
        start = len(beginning(build_source(build.plain(config.data)).tokenizer(), wish.prompt))
    except ValueError:  # said elsewhere
        return
    limits = {who: limit for module in model.modules() for who, limit in _limits(module)}
    if not limits:
        return
    who = min(limits, key=lambda name: limits[name])
    room = limits[who] - start + 1  # the last token is drawn and not read
    if wish.generate <= room:
        return
    way = f"use evaluation.generate={room}" if room > 0 else "use a shorter evaluation.prompt"
    yield (
        f"evaluation.generate={wish.generate}: a sample of so many tokens after {start} of the prompt is longer than the "
        f"{limits[who]} that {who} can take; {way}, or a larger context_length"
    )


def _limits(module: nn.Module) -> Iterator[tuple[str, int]]:
    """(class, longest document) of a layer that has such a limit."""
    most = module.filter.length if isinstance(module, Hyena) else getattr(module, "max_length", None)
    if isinstance(most, int):
        yield type(module).__name__, most


def unsayable(config: Config) -> Iterator[str]:
    """A sample of a task's data: of one whose answers are no next tokens, or from a prompt that is none of its tokens."""
    if not config.evaluation.generate:
        return
    try:
        source = build_source(build.plain(config.data))
    except ValueError:  # said elsewhere
        return
    if not isinstance(source, Task):
        return
    if source.aimed:
        kind = type(source).__name__
        yield (
            f"evaluation.generate={config.evaluation.generate} writes token after token, but what {kind} wants said is no next "
            "token; use evaluation.generate=0"
        )
        return
    try:
        source.tokenizer().encode(config.evaluation.prompt)
    except ValueError as error:
        yield f"evaluation.prompt={config.evaluation.prompt}: {error}"


def unwritable(config: Config) -> Iterator[str]:
    """Texts that name files and are longer than the system lets a name or a path be; nothing else may look at those."""
    settings = {f"data.{key}": value for key, value in config.data.settings().items()}
    for key, value in {"run_dir": config.run_dir, "resume": config.resume, **settings}.items():
        if not isinstance(value, str):
            continue
        longest = max(len(part.encode("utf-8", "surrogatepass")) for part in value.split("/"))
        fact = None
        if longest > NAME_BYTES:
            fact = f"the name of a file has at most {NAME_BYTES} bytes, here one has {longest}"
        elif len(value.encode("utf-8", "surrogatepass")) > PATH_BYTES:
            fact = f"a path has at most {PATH_BYTES} bytes, this one {len(value)}"
        elif "\0" in value:
            fact = "no path holds a null byte"
        if fact:
            yield f"{key}={shown(value)}: {fact}; write it shorter"
