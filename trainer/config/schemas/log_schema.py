"""Schema of the console, the loggers and W&B."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from trainer.config.nodes import ComponentConfig, ConfigGroup
from trainer.config.scalars import Count, Flag, Natural, Seconds

WANDB_CLASS = "trainer.logs.loggers.wandb.Wandb"


class ProfileConfig(ConfigGroup):
    """Traces of steps by torch's profiler."""

    steps: list[Count] = Field(default=[], description="steps to trace; [] = none")
    ranks: list[Natural] = Field(default=[0], description="ranks that trace them")
    memory: Flag = Field(
        default=False, description="allocations too, and on an accelerator a memory snapshot"
    )


class LogConfig(ConfigGroup):
    """The console, metrics.jsonl and traces."""

    every: Count = Field(
        default=1, description="steps between two rows; the first and last are always logged"
    )
    lag: Literal[0, 1] = Field(
        default=0,
        description="steps by which figures may lag: 1 = a step begins before those of the one"
        " before are read",
    )
    plots: bool = Field(default=True, description="pictures in report/, drawn when the run ends")
    console: Literal["plain", "rich", "json"] | None = Field(
        default=None, description="style of the output; null = rich on a terminal, else plain"
    )
    level: Literal["info", "warning", "error"] = Field(
        default="info",
        description="least that is printed; warning = quiet: warnings and the last screen",
    )
    on_event: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="command that is told of start, spike, skip, hang and end"
    )
    profile: ProfileConfig = ProfileConfig()


class LoggerConfig(ConfigGroup):
    """Loggers of a run: every key is a node, by the name that messages have for it."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)
    __pydantic_extra__: dict[str, ComponentConfig]

    @property
    def nodes(self) -> dict[str, ComponentConfig]:
        """The chosen loggers by name."""
        return dict(self.__pydantic_extra__ or {})


def usual_loggers() -> LoggerConfig:
    """Returns the loggers of a run that was recorded before loggers had names."""
    return LoggerConfig.model_validate({"wandb": {"_target_": WANDB_CLASS}})


class WandbConfig(ConfigGroup):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        default="auto", description="auto = online with a key"
    )
    project: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="project on the server; null = WANDB_PROJECT, else longspan"
    )
    entity: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "user or team that the project is of; null = WANDB_ENTITY, else the key's owner"
        ),
    )
    group: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None,
        description=(
            "runs shown together; null = WANDB_RUN_GROUP, else in a sweep its folder's name"
        ),
    )
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = Field(
        default=None,
        description=(
            "of the run on the server; null = WANDB_NAME, else in a sweep what varies, else name"
        ),
    )
    tags: list[Annotated[str, Field(min_length=1, max_length=64)]] = Field(
        default=[],
        description=(
            "of the run on the server; none = WANDB_TAGS, else in a sweep the settings that vary"
        ),
    )
    notes: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="a longer text beside the name; null = WANDB_NOTES"
    )
    id: Annotated[str, Field(min_length=1)] | None = Field(
        default=None,
        description=(
            "of the run on the server; null = the run directory's, WANDB_RUN_ID, or a new one"
        ),
    )
    alerts: bool | list[Literal["spike", "skipped", "hang", "end"]] = Field(
        default=False,
        description=(
            "what W&B sends a message about: true = all, or some of spike, skipped, hang, end"
        ),
    )
    artifacts: Flag = Field(default=False, description="send the newest checkpoint at the end")
    init_timeout_s: Seconds = Field(default=10, description="wait for the server, then offline")
