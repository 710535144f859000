"""Recognises that another launcher started this process as one of several, and which it is.

torchrun, deepspeed and accelerate say so in RANK and WORLD_SIZE; srun, mpirun and others have
variables of their own. They are brought to torchrun's names, so that everything else reads one set.
A start by one process alone is no such start: it may start ranks of its own.
"""

import os
import re
from dataclasses import dataclass

LOCAL_RANK_WORD = re.compile(
    r"--local[_-]rank=\d+"
)  # deepspeed puts it before the words of the user


class Incomplete(Exception):
    """Several processes were started and cannot find each other; the message is for the user."""


@dataclass(frozen=True)
class Names:
    """The variables in which a launcher tells a process its place; `size` may be in any of them."""

    starter: str
    rank: str
    size: tuple[str, ...]
    local_rank: str
    local_size: str


@dataclass(frozen=True)
class Start:
    """The place of this process among those that were started together; None where unknown."""

    starter: str
    rank: int
    size: int
    local_rank: int | None
    local_size: int | None


TORCHRUN = Names("torchrun", "RANK", ("WORLD_SIZE",), "LOCAL_RANK", "LOCAL_WORLD_SIZE")
SLURM = Names(
    "srun",
    "SLURM_PROCID",
    ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"),
    "SLURM_LOCALID",
    "",
)
# In this order: mpirun within a batch job inherits Slurm's variables, and deepspeed may use either
# of the two.
OTHERS = (
    Names("a launcher that sets RANK and WORLD_SIZE", *list(vars(TORCHRUN).values())[1:]),
    Names(
        "mpirun",
        "OMPI_COMM_WORLD_RANK",
        ("OMPI_COMM_WORLD_SIZE",),
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Names(
        "mpirun",
        "MV2_COMM_WORLD_RANK",
        ("MV2_COMM_WORLD_SIZE",),
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Names("mpirun", "PMI_RANK", ("PMI_SIZE",), "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Names(
        "jsrun",
        "JSM_NAMESPACE_RANK",
        ("JSM_NAMESPACE_SIZE",),
        "JSM_NAMESPACE_LOCAL_RANK",
        "JSM_NAMESPACE_LOCAL_SIZE",
    ),
    Names("flux run", "FLUX_TASK_RANK", ("FLUX_JOB_SIZE",), "FLUX_TASK_LOCAL_ID", ""),
    SLURM,
)


def started() -> Start | None:
    """Returns the place of this process among those started together; None when it is alone.

    Raises:
        Incomplete: a variable holds no number, or a place that cannot be.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _read(TORCHRUN)
    for names in OTHERS:
        if names is SLURM and not _within_srun():
            continue
        start = _read(names)
        if start is not None and start.size > 1:
            return start
    return None


def _within_srun() -> bool:
    """Tells whether this is a task of srun; a batch script has SLURM_PROCID too, and is alone."""
    return "SLURM_STEP_ID" in os.environ or os.environ.get("ENVIRONMENT") != "BATCH"


def _read(names: Names) -> Start | None:
    size_name = next((name for name in names.size if name in os.environ), None)
    rank = _number(names.rank)
    if rank is None or size_name is None:
        return None
    size = _number(size_name) or 0
    if rank >= size:
        raise Incomplete(
            f"{names.rank}={rank}: {size_name}={size}, so the last rank is {size - 1}; mend one of"
            " the two"
        )
    return Start(names.starter, rank, size, _number(names.local_rank), _number(names.local_size))


def _number(name: str) -> int | None:
    word = os.environ.get(name)
    if word is None:
        return None
    if not word.isdecimal():
        raise Incomplete(
            f"{name}={word}: a whole number from 0 on; unset it, or start the run with torchrun"
        )
    return int(word)


def adopt(start: Start) -> None:
    """Writes the place of this process into torchrun's variables.

    Raises:
        Incomplete: nothing says where the processes can meet.
    """
    port = os.environ.get("MASTER_PORT", "")
    if not os.environ.get("MASTER_ADDR") or not port.isdecimal() or not 0 < int(port) < 65536:
        raise Incomplete(
            f"{start.starter} started {start.size} processes, but MASTER_ADDR and MASTER_PORT do"
            " not say where they meet; export MASTER_ADDR=HOST_OF_RANK_0 MASTER_PORT=29500 for all"
            " of them, or start one process a machine with launch=multinode, or one process alone,"
            " which starts the ranks of its machine itself"
        )
    os.environ["RANK"] = str(start.rank)
    os.environ["WORLD_SIZE"] = str(start.size)
    for name, value in (("LOCAL_RANK", start.local_rank), ("LOCAL_WORLD_SIZE", start.local_size)):
        if value is not None:
            os.environ[name] = str(value)


def without_local_rank(words: list[str]) -> list[str]:
    """Returns the words of a command line without the one that deepspeed's launcher adds."""
    return [word for word in words if not LOCAL_RANK_WORD.fullmatch(word)]
