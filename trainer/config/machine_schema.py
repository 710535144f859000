"""Schema of the machines of a run: ranks, engine, launcher. A part of trainer/config/schema.py."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic_core import PydanticKnownError

from trainer.config.groups import choices
from trainer.config.nodes import ComponentConfig, ConfigGroup
from trainer.config.scalars import Count, Flag, Grace, Integer, Natural, Ranks, Seconds

WORD = r"^[A-Za-z0-9][A-Za-z0-9._=,+-]*$"


class ParallelConfig(ConfigGroup):
    """Sharing of sequences and data among ranks; ranks = context x data."""

    context: Ranks = Field(default=1, description="ranks that share one sequence")
    data: Ranks = Field(default=1, description="groups that read different rows")
    time: Count = Field(
        default=1, description="pieces of a row that its ranks compute one after another"
    )
    experts: Ranks = Field(
        default=1, description="neighbouring ranks that hold all experts between them"
    )
    micro_batch: Literal["auto"] | Count = Field(
        default="auto", description="rows per rank and forward"
    )
    method: Literal["auto", "ring", "ulysses", "allgather", "usp"] = Field(
        default="auto", description="how softmax attention is spread"
    )
    layout: Literal["zigzag", "contiguous", "balanced"] = Field(
        default="zigzag", description="which tokens a rank holds"
    )
    ulysses: Ranks | None = Field(
        default=None, description="under usp: ranks among which heads are divided"
    )
    ring: Ranks | None = Field(
        default=None, description="under usp: ranks of the ring; heads x ring = context"
    )
    tensor: Count = Field(default=1, description="tensor parallelism: out of scope, only 1")
    pipeline: Count = Field(default=1, description="pipeline parallelism: out of scope, only 1")

    @property
    def ranks(self) -> int:
        return self.context * self.data


def _engine_name(name: str) -> str:
    """Raises an error of pydantic unless conf/engine/ has a file of that name."""
    names = [choice for choice in choices("engine") if choice != "auto"]
    if name not in names:
        raise PydanticKnownError("literal_error", {"expected": " or ".join(map(repr, names))})
    return name


class EngineConfig(ComponentConfig):
    """Placement of parameters, gradients and optimiser state.

    The one table of what engines take. A setting goes to the constructor of the engine, unless it
    says `constructor: False`; one that says `engine: NAME` belongs to that engine alone.
    """

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, AfterValidator(_engine_name)] = Field(
        description="a file of conf/engine", json_schema_extra={"constructor": False}
    )
    zero_stage: Annotated[Integer, Field(ge=0, le=3)] | None = Field(
        default=None,
        description="DeepSpeed's stage; only engine=deepspeed",
        json_schema_extra={"engine": "deepspeed"},
    )
    offload: Literal["none", "optimizer", "parameters"] | None = Field(
        default=None,
        description=(
            "what lies in the host's memory (optimizer: its state; parameters: these too, only"
            " engine=deepspeed); only with an accelerator"
        ),
    )
    reshard_after_forward: Flag | None = Field(
        default=None,
        description="free gathered weights at once; only engine=fsdp",
        json_schema_extra={"engine": "fsdp"},
    )
    replicate: Ranks | None = Field(
        default=None,
        description=(
            "times that parameters are held, each time sharded over ranks of its own; only"
            " engine=fsdp"
        ),
        json_schema_extra={"engine": "fsdp", "constructor": False},
    )
    checkpointing: Literal["none", "full", "selective"] = Field(
        default="none",
        description="computed twice: nothing, blocks, or blocks but for their attention",
    )
    offload_activations: Flag = Field(
        default=False,
        description=(
            "what blocks save for backward waits in the host's memory; only with an accelerator"
        ),
        json_schema_extra={"constructor": False},
    )
    compile: Flag = Field(default=False, description="torch.compile, block by block")
    tile_tokens: Count | None = Field(
        default=None,
        description=(
            "tokens for which feed-forward layers and losses are computed at once; null = all"
        ),
        json_schema_extra={"constructor": False},
    )
    head_groups: Count | None = Field(
        default=None,
        description="groups of heads in which attention is computed; null = all heads at once",
        json_schema_extra={"constructor": False},
    )

    @classmethod
    def owner(cls, key: str) -> str | None:
        """Returns the engine that alone takes a setting; None where all do."""
        return cls._remarks(key).get("engine")

    def arguments(self) -> dict[str, Any]:
        """Returns the settings that the constructor of this engine takes."""
        taken = {}
        for key, value in self.settings().items():
            remarks = self._remarks(key)
            # An engine of the user's own need not take what is not asked for.
            if value is None or not remarks.get("constructor", True):
                continue
            if remarks.get("engine", self.name) == self.name:
                taken[key] = value
        return taken

    @classmethod
    def _remarks(cls, key: str) -> dict[str, Any]:
        remarks = cls.model_fields[key].json_schema_extra
        return remarks if isinstance(remarks, dict) else {}


class LaunchConfig(ConfigGroup):
    """The way in which ranks are started."""

    name: Literal["local", "multinode", "slurm"] = Field(
        default="local", description="where ranks are started"
    )
    max_restarts: Natural = Field(
        default=0, description="times that all ranks are started again after one died"
    )
    oversubscribe: Flag = Field(default=False, description="allow more than 8 ranks per core")
    force: Flag = Field(
        default=False, description="start though a step seems to take more memory than there is"
    )
    dry_run: Flag = Field(default=False, description="say what would be started, and leave")
    timeout_s: Seconds = Field(default=600, description="longest wait in one collective")
    grace_s: Grace = Field(default=60, description="time to save after SIGTERM, before SIGKILL")
    nodes: Ranks = Field(
        default=1, description="machines, each with as many ranks; only launch=multinode or slurm"
    )
    node_rank: Natural | None = Field(
        default=None, description="which of the machines this is; 0 holds the meeting"
    )
    rdzv_endpoint: str | None = Field(
        default=None, description="HOST:PORT of machine 0, where all meet; only launch=multinode"
    )
    address: str | None = Field(
        default=None, description="by which the others reach this machine; null = its name"
    )
    partition: str | None = Field(
        default=None, pattern=WORD, description="where the job runs; from here on only launch=slurm"
    )
    account: str | None = Field(default=None, pattern=WORD, description="who pays for the job")
    time: str | None = Field(
        default=None,
        description="longest time of the job, as sbatch takes it; null = the partition's",
    )
    gpus: Natural | None = Field(default=None, description="of each machine; null = one a rank")
    cores: Count = Field(default=4, description="processor cores for each rank")
    requeue: Flag = Field(
        default=True, description="put back a job that was preempted or ran out of time"
    )
    options: list[str] = Field(default=[], description="further options of sbatch")
    setup: list[str] = Field(
        default=[], description="shell lines of the job before the ranks start"
    )
