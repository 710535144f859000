"""Checks the machine, the paths, and the way in which ranks are started."""

from collections.abc import Iterator

from trainer.config.finding import Finding
from trainer.config.schema import Config, LaunchConfig
from trainer.launch import slurm
from trainer.launch.elastic import machine_limits, restart_count

NAME_BYTES = 255  # of the usual file systems
PATH_BYTES = 4095
RANKS_PER_CORE = 8
RENDEZVOUS_KEYS = ("nodes", "node_rank", "rdzv_endpoint", "address")


def check_rendezvous(config: Config) -> Iterator[Finding]:
    """Checks that several machines can find one another, and that one machine is told of none."""
    yield from _check_launch_owner(config)
    launch = config.launch
    if launch.name != "multinode":
        return
    host, _, port = (launch.rdzv_endpoint or "").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        yield Finding(
            "launch.rdzv_endpoint",
            launch.rdzv_endpoint or None,
            "machines meet at HOST:PORT of the first",
            "for example node0:29500",
        )
    if launch.node_rank is None or launch.node_rank >= launch.nodes:
        yield Finding(
            "launch.node_rank",
            launch.node_rank,
            f"must be a number from 0 to {launch.nodes - 1}, another on each of the"
            f" {launch.nodes} machines",
            "give the first machine launch.node_rank=0",
            causes=("launch.nodes",),
        )
    if config.parallel.ranks % launch.nodes:
        yield slurm.ranks_per_node_finding(config)
    if config.run_dir is None:
        yield Finding(
            "run_dir",
            None,
            "the machines could not find their run",
            "give run_dir=PATH, a folder that all of them see",
        )


def _check_launch_owner(config: Config) -> Iterator[Finding]:
    """Refuses settings of launch=multinode and launch=slurm under another way of starting."""
    launch = config.launch
    defaults = LaunchConfig()
    for key in (*RENDEZVOUS_KEYS, *slurm.KEYS):
        value = getattr(launch, key)
        if value == getattr(defaults, key):
            continue
        # A batch job has a number of nodes as well.
        fits_slurm = launch.name == "slurm" and key == "nodes"
        if key in RENDEZVOUS_KEYS and launch.name != "multinode" and not fits_slurm:
            yield Finding(
                f"launch.{key}",
                value,
                f"is for several machines, but launch={launch.name}",
                "use launch=multinode",
                causes=("launch.name",),
            )
        if key in slurm.KEYS and launch.name != "slurm":
            yield Finding(
                f"launch.{key}",
                value,
                f"is for a batch job, but launch={launch.name}",
                "use launch=slurm",
                causes=("launch.name",),
            )


def check_paths(config: Config) -> Iterator[Finding]:
    """Checks that each setting which names a file is a path that the system can open."""
    settings = {
        "run_dir": config.run_dir,
        "resume": config.resume,
        "init_from": config.init_from,
        "lora.adapter": config.lora.adapter,
        "model.path": config.model.path,
    }
    for key, value in config.data.settings().items():
        settings[f"data.{key}"] = value
    for key, value in settings.items():
        if not isinstance(value, str):
            continue
        names = [part.encode("utf-8", "surrogatepass") for part in value.split("/")]
        longest_name = max(len(name) for name in names)
        if longest_name > NAME_BYTES:
            fact = f"the name of a file has at most {NAME_BYTES} bytes, here one has {longest_name}"
        elif len(value.encode("utf-8", "surrogatepass")) > PATH_BYTES:
            fact = f"a path has at most {PATH_BYTES} bytes, this one {len(value)}"
        elif "\0" in value:
            fact = "no path holds a null byte"
        else:
            continue
        yield Finding(key, value, fact, "write it shorter")


def check_machine(config: Config) -> Iterator[Finding]:
    """Checks that this machine can carry the ranks that the config starts on it."""
    yield from check_rendezvous(config)
    if config.launch.name == "slurm":
        # A batch job runs on other machines, whose cores and GPUs are not known here.
        yield from slurm.check_slurm(config)
        return
    ranks = config.parallel.ranks // config.launch.nodes
    cores, gpus = machine_limits()
    ranks_here = f"with parallel.data={config.parallel.data} that is {ranks} ranks"
    if config.launch.nodes > 1:
        ranks_here += " on each machine"
    if gpus and ranks > gpus:
        yield Finding(
            "parallel.context",
            config.parallel.context,
            f"{ranks_here}, but this machine has {gpus} GPUs",
            f"use at most {gpus} ranks, or start torchrun on several machines",
            causes=("parallel.data", "launch.nodes"),
        )
    most_ranks = RANKS_PER_CORE * cores
    if not gpus and ranks > most_ranks and not config.launch.oversubscribe:
        yield Finding(
            "parallel.context",
            config.parallel.context,
            f"{ranks_here}, but {cores} cores carry {most_ranks} at {RANKS_PER_CORE} ranks per"
            " core",
            "use fewer ranks, or launch.oversubscribe=true",
            causes=("parallel.data", "launch.nodes"),
        )


def check_outer_launcher(config: Config, started: int, starter: str) -> Iterator[Finding]:
    """Checks that the ranks which another launcher started are those of the config.

    Args:
        config: the config to check.
        started: number of ranks that were started.
        starter: name of the launcher, for example torchrun, srun, mpirun or deepspeed.
    """
    parallel = config.parallel
    launch = config.launch
    if parallel.ranks != started:
        yield Finding(
            "parallel.context",
            parallel.context,
            f"with parallel.data={parallel.data} that is {parallel.ranks} ranks, but {starter}"
            f" started {started}",
            f"start {parallel.ranks}, or change one of the two",
            causes=("parallel.data",),
        )
    restarts = restart_count()[1]
    if restarts and config.run_dir is None:
        yield Finding(
            "run_dir",
            None,
            "after torchrun --max-restarts the ranks could not find their run again",
            "give run_dir=PATH",
        )
    if launch.name != "local":
        yield Finding(
            "launch",
            launch.name,
            f"{starter} has started the ranks already",
            "leave one of the two out",
        )
    elif launch.max_restarts:
        if starter == "torchrun":
            remedy = "give --max-restarts to torchrun"
        else:
            remedy = "leave launch.max_restarts out"
        yield Finding(
            "launch.max_restarts", launch.max_restarts, f"{starter} starts the ranks", remedy
        )
    if launch.grace_s != LaunchConfig().grace_s:
        yield Finding(
            "launch.grace_s",
            launch.grace_s,
            f"{starter} stops the ranks in its own time",
            "leave launch.grace_s out",
        )
