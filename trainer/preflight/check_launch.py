"""Checks of the machine and the way ranks are started."""

from collections.abc import Iterator

from trainer.config.schema import Config, LaunchConfig
from trainer.config.values import quoted_value
from trainer.launch import slurm
from trainer.launch.elastic import machine_limits, restart_count

NAME_BYTES = 255  # of the usual file systems
PATH_BYTES = 4095
RENDEZVOUS_KEYS = ("nodes", "node_rank", "rdzv_endpoint", "address")


def check_rendezvous(config: Config) -> Iterator[str]:
    """Several machines that could not find each other, or that are told of a meeting that does not
    take place."""
    wish = config.launch
    ranks = config.parallel.ranks
    for key in (
        key
        for key in (*RENDEZVOUS_KEYS, *slurm.KEYS)
        if getattr(wish, key) != getattr(LaunchConfig(), key)
    ):
        if (
            key in RENDEZVOUS_KEYS
            and wish.name != "multinode"
            and (key, wish.name) != ("nodes", "slurm")
        ):
            yield (
                f"launch.{key}={getattr(wish, key)} is for several machines, but"
                f" launch={wish.name}; use launch=multinode"
            )
        if key in slurm.KEYS and wish.name != "slurm":
            yield (
                f"launch.{key}={getattr(wish, key)} is for a batch job, but launch={wish.name}; use"
                " launch=slurm"
            )
    if wish.name != "multinode":
        return
    host, _, port = (wish.rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        yield (
            f"launch.rdzv_endpoint={wish.rdzv_endpoint or 'null'}: machines meet at HOST:PORT of"
            " the first; for example node0:29500"
        )
    if wish.node_rank is None or wish.node_rank >= wish.nodes:
        shown = "null" if wish.node_rank is None else wish.node_rank
        yield (
            f"launch.node_rank={shown}: give each of the {wish.nodes} machines a number from 0 to"
            f" {wish.nodes - 1}"
        )
    if ranks % wish.nodes:
        yield (
            f"{ranks} ranks do not divide among launch.nodes={wish.nodes} machines; change"
            " parallel.data or launch.nodes"
        )
    if config.run_dir is None:
        yield (
            "run_dir=null: the machines could not find their run; give run_dir=PATH, a folder that"
            " all of them see"
        )


def check_writable(config: Config) -> Iterator[str]:
    """Texts that name files and are longer than the system lets a name or a path be; nothing else
    may look at those."""
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
            yield f"{key}={quoted_value(value)}: {fact}; write it shorter"


RANKS_PER_CORE = 8


def check_machine(config: Config) -> Iterator[str]:
    """Whether this machine can carry the ranks."""
    ranks = config.parallel.ranks // config.launch.nodes
    cores, gpus = machine_limits()
    wish = (
        f"parallel.context={config.parallel.context} x parallel.data={config.parallel.data} is"
        f" {ranks} ranks"
    )
    wish += " on each machine" if config.launch.nodes > 1 else ""
    yield from check_rendezvous(config)
    if config.launch.name == "slurm":  # other machines will
        yield from slurm.judge(config)
        return
    if gpus and ranks > gpus:
        yield (
            f"{wish}, but this machine has {gpus} GPUs; use at most {gpus} ranks, or start torchrun"
            " on several machines"
        )
    if not gpus and ranks > RANKS_PER_CORE * cores and not config.launch.oversubscribe:
        yield (
            f"{wish}, but {cores} cores carry {RANKS_PER_CORE * cores} at {RANKS_PER_CORE} ranks"
            " per core; use fewer ranks, or launch.oversubscribe=true"
        )


def check_outer_launcher(config: Config, started: int, starter: str) -> Iterator[str]:
    """Whether somebody else (torchrun, srun, mpirun, deepspeed) started the ranks that the config
    means."""
    parallel = config.parallel
    if parallel.ranks != started:
        yield (
            f"parallel.context={parallel.context} x parallel.data={parallel.data} is"
            f" {parallel.ranks} ranks, but {starter} started {started}; start {parallel.ranks}, or"
            " change one of the two"
        )
    if restart_count()[1] and config.run_dir is None:
        yield (
            "run_dir=null with torchrun --max-restarts: the ranks could not find their run again;"
            " give run_dir=PATH"
        )
    if config.launch.name != "local":
        yield (
            f"launch={config.launch.name}, but {starter} has started the ranks already; leave one"
            " of the two out"
        )
    elif config.launch.max_restarts:
        remedy = (
            "give --max-restarts to torchrun"
            if starter == "torchrun"
            else "leave launch.max_restarts out"
        )
        yield (
            f"launch.max_restarts={config.launch.max_restarts}: {starter} starts the ranks;"
            f" {remedy}"
        )
    if config.launch.grace_s != LaunchConfig().grace_s:
        yield (
            f"launch.grace_s={config.launch.grace_s}: {starter} stops the ranks in its own time;"
            " leave launch.grace_s out"
        )
