"""Machines that the jobs of a sweep run on: this one, or all of a Slurm allocation.

Within an allocation of several machines (`salloc -N 4`, or a batch script) each machine carries as
many jobs as it has room for. A job is a step of its own there, `srun --nodes=1 --overlap`: Slurm
starts it, passes signals on, and ends it with the sweep. The steps share the allocation, so which
GPUs and how many threads a job takes is decided here.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.errors import UserError
from trainer.launch.elastic import machine_limits

SCONTROL_S = 60
FIRST_OWN_STEP = 0xFFFFFFF0  # larger numbers of steps are Slurm's: a batch script, a salloc shell
CORES = re.compile(r"(\d+)(?:\(x(\d+)\))?")  # 16(x3) = three machines of 16 cores
# In the step: of the GPUs that Slurm gave it, those at these places, then the command.
IN_STEP = """places=$1; shift
if [ -n "$places" ]; then
    IFS=, read -ra seen <<< "$CUDA_VISIBLE_DEVICES"
    chosen=
    for place in ${places//,/ }; do chosen+="${chosen:+,}${seen[place]:-$place}"; done
    export CUDA_VISIBLE_DEVICES=$chosen
fi
exec "$@\""""


@dataclass(frozen=True)
class Machine:
    """A machine that jobs run on.

    Attributes:
        name: that srun knows it by; None = this one, where jobs are started directly.
        cores: that its jobs may use.
        gpus: as CUDA_VISIBLE_DEVICES names them here, and by place elsewhere; empty = none.
    """

    name: str | None
    cores: int
    gpus: tuple[str, ...]


@dataclass(frozen=True)
class JobSlots:
    """The slots of a job: `environment` is that of its process, and of srun's."""

    machine: Machine
    ranks: int
    gpus: tuple[str, ...]
    environment: dict[str, str]

    def command(self, words: Sequence[str]) -> list[str]:
        """Returns the command that runs `words` there."""
        if self.machine.name is None:
            return list(words)
        return [
            "srun",
            "--nodes=1",
            "--ntasks=1",
            f"--nodelist={self.machine.name}",
            f"--cpus-per-task={self.machine.cores}",
            # Steps that do not overlap would wait for one another's memory.
            "--overlap",
            "--cpu-bind=none",
            "--mem=0",
            "bash",
            "-c",
            IN_STEP,
            "job",
            ",".join(self.gpus),
            *words,
        ]


class Slots:
    """Counts the free slots for ranks.

    Args:
        ranks: number of slots on all machines together; None takes one for each GPU, or for each
            core where there is no GPU.
        machines: that carry them, of which each gets the same share; None = see machines().

    Raises:
        UserError: more ranks at once than GPUs.
    """

    def __init__(self, ranks: int | None, machines: Sequence[Machine] | None = None):
        self.machines = list(machines_here() if machines is None else machines)
        gpus = sum(len(machine.gpus) for machine in self.machines)
        if gpus and ranks and ranks > gpus:
            where = "this machine has"
            if len(self.machines) > 1:
                where = f"the {len(self.machines)} machines have"
            raise UserError(
                f"hydra.launcher.ranks={ranks}, but {where} {gpus} GPUs; use at most {gpus}"
            )
        self.many = ranks or gpus or sum(machine.cores for machine in self.machines)
        self.most: list[int] = []
        self.free: list[tuple[str, ...]] = []
        for machine in self.machines:
            most = len(machine.gpus) if gpus else machine.cores
            if ranks:
                share = -(-ranks // len(self.machines))
                most = min(most, share) if gpus else share
            self.most.append(most)
            self.free.append(machine.gpus[:most])
        self.taken = [0] * len(self.machines)

    def fit(self, ranks: int) -> bool:
        """Reports that `ranks` more can start now.

        A task with more ranks than slots runs alone.
        """
        return self._room(ranks) is not None

    def _room(self, ranks: int) -> int | None:
        """Returns the number of the machine with the fewest ranks that has room."""
        together = sum(self.taken)
        if together and together + ranks > self.many:
            return None
        found = None
        for number, taken in enumerate(self.taken):
            has_room = not taken or taken + ranks <= self.most[number]
            if has_room and (found is None or taken < self.taken[found]):
                found = number
        return found

    def take(self, ranks: int) -> JobSlots:
        """Takes slots for a task that fits."""
        number = self._room(ranks)
        assert number is not None, "asked for without room"
        machine = self.machines[number]
        self.taken[number] += ranks
        threads = max(1, machine.cores // max(1, self.most[number]))
        usual = os.environ.get("OMP_NUM_THREADS", str(threads))
        environment = {**os.environ, "OMP_NUM_THREADS": usual}
        own = self.free[number][:ranks]
        self.free[number] = self.free[number][ranks:]
        if machine.gpus and machine.name is None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        return JobSlots(machine, ranks, own, environment)

    def give(self, place: JobSlots) -> None:
        """Returns what `take` gave."""
        number = self.machines.index(place.machine)
        self.taken[number] -= place.ranks
        self.free[number] += place.gpus

    def describe(self) -> str:
        """Returns the number of slots, and where they are if not here."""
        text = f"up to {self.many} ranks at once"
        if self.machines[0].name is None:
            return text
        names = ", ".join(str(machine.name) for machine in self.machines)
        return f"{text} on {len(self.machines)} machines of the allocation ({names})"


def machines_here() -> list[Machine]:
    """Returns the machines of the Slurm allocation of this process, or this one alone.

    Raises:
        UserError: this is an allocation of several machines, and Slurm's commands are not there.
    """
    many = os.environ.get("SLURM_JOB_NUM_NODES", "")
    step = os.environ.get("SLURM_STEP_ID", "")
    # A step of the user's own says itself where it runs.
    in_step = step.isdecimal() and int(step) < FIRST_OWN_STEP
    if not many.isdecimal() or int(many) < 2 or in_step:
        return [_this_machine()]
    for tool in ("srun", "scontrol"):
        if shutil.which(tool) is None:
            raise UserError(
                f"SLURM_JOB_NUM_NODES={many}: jobs are started on these machines by {tool}, which"
                " is not on PATH; add it, or unset SLURM_JOB_NUM_NODES to use this machine alone"
            )
    return list(_allocated())


def _this_machine() -> Machine:
    cores, gpus = machine_limits()
    names: list[str] = []
    if gpus:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = seen.split(",") if seen else [str(gpu) for gpu in range(gpus)]
    return Machine(None, cores, tuple(names))


def _allocated() -> Iterator[Machine]:
    """Yields the machines of the allocation; Slurm names them and their cores in one order."""
    listed = os.environ.get("SLURM_JOB_NODELIST", "")
    told = subprocess.run(
        ["scontrol", "show", "hostnames", listed],
        capture_output=True,
        text=True,
        timeout=SCONTROL_S,
    )
    names = told.stdout.split()
    if told.returncode or not names:
        said = " ".join(told.stderr.split()) or f"exit status {told.returncode}"
        raise UserError(
            f"SLURM_JOB_NODELIST={listed}: scontrol does not name the machines ({said}); unset"
            " SLURM_JOB_NUM_NODES to use this machine alone"
        )
    cores: list[int] = []
    for many, times in CORES.findall(os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")):
        cores += [int(many)] * int(times or 1)
    if len(cores) != len(names):
        cores = [machine_limits()[0]] * len(names)
    gpus = tuple(str(place) for place in range(_gpus_of_each()))
    for name, many in zip(names, cores, strict=True):
        yield Machine(name, many, gpus)


def _gpus_of_each() -> int:
    """Returns the number of GPUs that each machine of the allocation has, as the first has."""
    for variable in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        # The second may name their kind: a100:4.
        many = os.environ.get(variable, "").rpartition(":")[2]
        if many.isdecimal():
            return int(many)
    return machine_limits()[1]
