"""Whether a config can be honoured, before any rank starts: every fault at once, each with the fact and a way out.

Cheap questions come first, but all are asked. What is not built yet is refused by name here, in one table a setting.
"""

import importlib.util
from collections.abc import Collection, Iterator

from parallel.engines.engine import SELECTIVE, Engine
from parallel.launch import attempt, machine
from parallel.layout import POLICIES
from parallel.mesh import misfits
from parallel.spread import METHODS
from trainer import build, directory, room, slurm, zero
from trainer.config import Config, Fault, Launch, Memory
from trainer.data.opening import check as look_at
from trainer.lengthening import unfit
from trainer.logs.labels import judge as judge_labels
from trainer.objectives.contradictions import misused
from trainer.parts import model, nodes, too_long
from trainer.unmet import homeless, meeting, unsayable, unwritable

RANKS_PER_CORE = 8
NO_MEMORY = Memory.model_fields["target"].default
MATCHES = ("none", "parameters", "flops")
ENGINES = {name: f"parallel.engines.{name}.{name.capitalize()}" for name in ("single", "fsdp", "deepspeed")}
LAUNCHES = ("local", "multinode", "slurm")


def check(
    config: Config,
    given: Collection[str] = (),
    mended: Collection[str] = (),
    known: Collection[str] = (),
    started: int | None = None,
    starter: str = "torchrun",
) -> list[str]:
    """Every fault of a config, as messages.

    Args:
        config: what to judge.
        given: keys and groups that the user set by hand; only those can be wishes that nobody takes.
        mended: keys whose value was a fault already and was put back; nothing more is said of them.
        known: messages found before; they come first.
        started: ranks that somebody else has started already; None when this machine starts them. starter: who that was.
    """
    faults = [*known, *unwritable(config)]
    if len(faults) > len(known):
        return faults
    carried = machinery(config) if started is None else outside(config, started, starter)
    asked = (sizes, room.tokens, built, spreading, engine, directory.judge, unfit, judge_labels, nodes, data, misused)
    answers = (each(config) for each in asked)
    for answer in (carried, *answers):
        faults += [each for each in answer if not any(key in each for key in mended)]
    if len(faults) == len(known):
        faults += model(config, given)
    return list(dict.fromkeys(faults))


def demand(config: Config) -> None:
    """Raise one Fault with everything that `check` finds."""
    if faults := check(config):
        raise Fault("\n".join(faults))


def sizes(config: Config) -> Iterator[str]:
    """Sizes that have to fit one another."""
    model, rows = config.model, config.batch_tokens / config.context_length
    if rows != int(rows):
        low = max(1, int(rows)) * config.context_length
        yield (
            f"batch_tokens={config.batch_tokens} is no multiple of context_length={config.context_length}; "
            f"use batch_tokens={low}, or another context_length"
        )
    if model.width % model.heads:
        near = -(-model.width // model.heads) * model.heads
        yield (
            f"model.width={model.width} does not divide among model.heads={model.heads}; "
            f"use model.width={near}, or a divisor of the width as heads"
        )
    if model.kv_heads and model.heads % model.kv_heads:
        fit = [n for n in range(1, model.heads + 1) if model.heads % n == 0]
        yield (
            f"model.kv_heads={model.kv_heads} does not divide model.heads={model.heads}; "
            f"use model.kv_heads={min(fit, key=lambda n: abs(n - (model.kv_heads or 1)))}"
        )
    if model.max_length and config.context_length > model.max_length:
        yield too_long(config, model.max_length, f"model.max_length={model.max_length}")
    if rows == int(rows) and isinstance(config.parallel.micro_batch, int):
        each = -(-int(rows) // config.parallel.data)
        if config.parallel.micro_batch > each:
            yield (
                f"parallel.micro_batch={config.parallel.micro_batch}, but a step has {each} rows for each data rank "
                f"(batch_tokens / context_length / parallel.data); use parallel.micro_batch={each}"
            )


def built(config: Config) -> Iterator[str]:
    """What has a name already but is not built yet."""
    parallel = config.parallel
    tables: list[tuple[str, str, Collection[str], str]] = [
        ("parallel.method", parallel.method, ("auto", *METHODS), "ring"),
        ("parallel.layout", parallel.layout, tuple(POLICIES), "zigzag"),
        ("match", config.match, MATCHES, "none"),
        ("launch", config.launch.name, LAUNCHES, "local"),
    ]
    for key, wish, there, instead in tables:
        if wish not in there:
            yield f"{key}={wish} is not built yet; use {key}={instead} (there is: {', '.join(there)})"
    for key, wish in (("tensor", parallel.tensor), ("pipeline", parallel.pipeline)):
        if wish != 1:
            yield (
                f"parallel.{key}={wish}: {key} parallelism is out of Longspan's scope; use parallel.{key}=1, share the "
                f"sequence with parallel.context={wish}, and the parameters with engine=fsdp"
            )


def spreading(config: Config) -> Iterator[str]:
    """Whether a sequence can be shared as asked, and whether the ranks make the groups that experts and replicas need."""
    parallel = config.parallel
    yield from misfits(parallel.ranks, parallel.experts, config.engine.replicas or 1)
    heads, context = config.model.heads, parallel.context
    if parallel.method == "heads" and context > heads:
        yield (
            f"parallel.method=heads over {context} ranks needs {context} query heads, but model.heads={heads}; "
            f"use parallel.method=ring, or parallel.context={heads}"
        )
    if parallel.method == "usp" and (parallel.heads or 1) > heads:
        yield (
            f"parallel.heads={parallel.heads} divides query heads among {parallel.heads} ranks, but model.heads={heads}; "
            f"use parallel.heads={heads} or fewer, and more in parallel.ring"
        )
    grid = {key: size for key, size in (("heads", parallel.heads), ("ring", parallel.ring)) if size is not None}
    if parallel.method != "usp":
        for key, size in grid.items():
            yield (
                f"parallel.{key}={size} means something under parallel.method=usp only, "
                f"but parallel.method={parallel.method}; use parallel.{key}=null"
            )
    elif len(grid) < 2:
        yield f"parallel.method=usp needs parallel.heads and parallel.ring; their product must be parallel.context={context}"
    elif parallel.heads and parallel.ring and parallel.heads * parallel.ring != context:
        yield (
            f"parallel.heads={parallel.heads} x parallel.ring={parallel.ring} is {parallel.heads * parallel.ring}, but "
            f"parallel.context={context}; use parallel.context={parallel.heads * parallel.ring}"
        )


def machinery(config: Config) -> Iterator[str]:
    """Whether this machine can carry the ranks."""
    ranks, (cores, gpus) = config.parallel.ranks // config.launch.nodes, machine()
    wish = f"parallel.context={config.parallel.context} x parallel.data={config.parallel.data} is {ranks} ranks"
    wish += " on each machine" if config.launch.nodes > 1 else ""
    yield from meeting(config)
    if config.launch.name == "slurm":  # other machines will
        yield from slurm.judge(config)
        return
    if gpus and ranks > gpus:
        yield f"{wish}, but this machine has {gpus} GPUs; use at most {gpus} ranks, or start torchrun on several machines"
    if not gpus and ranks > RANKS_PER_CORE * cores and not config.launch.oversubscribe:
        yield (
            f"{wish}, but {cores} cores carry {RANKS_PER_CORE * cores} at {RANKS_PER_CORE} ranks per core; "
            "use fewer ranks, or launch.oversubscribe=true"
        )


def outside(config: Config, started: int, starter: str) -> Iterator[str]:
    """Whether somebody else (torchrun, srun, mpirun, deepspeed) started the ranks that the config means."""
    parallel = config.parallel
    if parallel.ranks != started:
        yield (
            f"parallel.context={parallel.context} x parallel.data={parallel.data} is {parallel.ranks} ranks, but {starter} "
            f"started {started}; start {parallel.ranks}, or change one of the two"
        )
    if attempt()[1] and config.run_dir is None:
        yield "run_dir=null with torchrun --max-restarts: the ranks could not find their run again; give run_dir=PATH"
    if config.launch.name != "local":
        yield f"launch={config.launch.name}, but {starter} has started the ranks already; leave one of the two out"
    elif config.launch.max_restarts:
        remedy = "give --max-restarts to torchrun" if starter == "torchrun" else "leave launch.max_restarts out"
        yield f"launch.max_restarts={config.launch.max_restarts}: {starter} starts the ranks; {remedy}"
    if config.launch.grace_s != Launch().grace_s:
        yield f"launch.grace_s={config.launch.grace_s}: {starter} stops the ranks in its own time; leave launch.grace_s out"


def engine(config: Config) -> Iterator[str]:
    """Whether the engine is there and its settings are its own."""
    asked = config.engine
    there = importlib.util.find_spec(asked.target.rpartition(".")[0] or asked.target)
    if there is None:
        yield f"engine={asked.name} is not built yet; use engine=fsdp"
    elif asked.target != ENGINES[asked.name]:  # a user's own; ours may be slow to import
        yield from another_engine(asked.target)
    if asked.checkpointing == "selective" and asked.compile:
        yield SELECTIVE
    yield from homeless(config)
    if asked.name == "deepspeed":
        yield from zero.settings(config)
    for key, value, owner in (
        ("zero", asked.zero, "deepspeed"),
        ("offload", asked.offload, "deepspeed"),
        ("reshard_after_forward", asked.reshard_after_forward, "fsdp"),
        ("replicas", asked.replicas, "fsdp"),
    ):
        if value is not None and asked.name != owner:
            shown = str(value).lower()
            yield f"engine.{key}={shown} is a setting of engine={owner}, but engine={asked.name}; use engine={owner}"


def another_engine(target: str) -> Iterator[str]:
    """Whether a class that no yaml of conf/engine names is an engine."""
    try:
        kind = build.find_class(target, "engine")
    except Fault as fault:
        yield str(fault)
        return
    if not issubclass(kind, Engine):
        yield f"engine._target_={target}: {kind.__name__} is no engine; leave engine._target_ out, or name a class of that kind"


def data(config: Config) -> Iterator[str]:
    """Whether the data is there and can be read, as far as a quick look tells."""
    node = build.plain(config.data)
    if config.evaluation.every and node.get("held_out") == 0:
        yield "data.held_out=0 keeps nothing to evaluate on; use data.held_out=0.02, or evaluation.every=0"
    if faults := build.judge(node, {}, "data"):
        yield from faults
    else:
        evaluates = bool(config.evaluation.every) and node.get("held_out") != 0
        yield from look_at(node, evaluates=evaluates, context_length=config.context_length, lanes=config.memory.carries)
        yield from unsayable(config)
