"""Schema of a run: every setting with its type, range and choices, in one frozen model.

A *node* names a class by `_target_`; instantiate.py binds its further keys to the signature.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from trainer.config.machine_schema import WORD, EngineConfig, LaunchConfig, ParallelConfig
from trainer.config.nodes import ComponentConfig, ConfigGroup
from trainer.config.scalars import (
    Count,
    Flag,
    Fraction,
    Heads,
    Layers,
    Natural,
    Positive,
    Real,
    Seed,
    Size,
    Vocabulary,
)
from trainer.config.schemas.log_schema import (
    LogConfig,
    LoggerConfig,
    WandbConfig,
    usual_loggers,
)
from trainer.config.stage_schema import StageConfig

HELD_OUT = "heldout"  # the evaluation whose figures bear no prefix
HELD_OUT_CLASS = "trainer.evaluation.held_out.HeldOut"


class ModelConfig(ComponentConfig):
    """The whole model; a pattern lists labels of nodes and is repeated or cut to `layers`."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="folder of a Hugging Face model whose config.json gives the rest; model=hub",
    )
    width: Size = Field(description="features of the residual stream")
    layers: Layers = Field(description="blocks")
    heads: Heads = Field(description="query heads, offered to every mixer")
    kv_heads: Heads | None = Field(
        default=None, description="key-value heads; null = as many as heads"
    )
    ffn: Count | Positive | None = Field(
        default=None, description="feed-forward width; 2.75 = a multiple of width, 352 = itself"
    )
    vocabulary: Vocabulary | None = Field(
        default=None, description="tokens known; null = the tokenizer's"
    )
    max_length: Count | None = Field(
        default=None, description="longest document position the model may meet; null = any"
    )
    allow_leaks: Flag = Field(
        default=False,
        description="train a class of your own that leaks between tokens; unshared only",
    )
    pattern: list[str] = Field(
        default=[], description="labels of mixers, repeated or cut to layers"
    )
    mixers: dict[str, ComponentConfig] = Field(
        default={}, description="the mixers that pattern names"
    )
    encoder_layers: Layers | None = Field(
        default=None, description="blocks over the source; null = as many as layers"
    )
    encoder_pattern: list[str] = Field(
        default=[], description="labels of mixers over the source, repeated or cut"
    )
    encoder_position: ComponentConfig | None = Field(
        default=None, description="positions of the source; null = as position= says"
    )
    feedforward: ComponentConfig | None = Field(
        default=None, description="one for all layers; replaces feedforward_pattern"
    )
    feedforward_pattern: list[str] = Field(
        default=[], description="labels of feedforwards, repeated or cut to layers"
    )
    feedforwards: dict[str, ComponentConfig] = Field(
        default={}, description="the feed-forward layers that feedforward_pattern names"
    )


class MemoryConfig(ComponentConfig):
    """State carried from one row of a lane to the next."""

    target: str = Field(
        "models.memory.base.Memory",
        alias="_target_",
        min_length=3,
        description="the class to build",
    )
    name: str = Field(default="none", description="none, segments, tokens, lookup or compressive")
    length: Natural = Field(default=0, description="tokens carried")

    @property
    def carries(self) -> bool:
        """Tells whether rows are read in lanes, each of which goes on from step to step."""
        return self.name != "none"


class CacheConfig(ComponentConfig):
    """The store of keys and values of earlier tokens while a model generates."""

    target: str = Field(
        "models.cache.contiguous.Contiguous",
        alias="_target_",
        min_length=3,
        description="the class to build",
    )


class DataConfig(ComponentConfig):
    """Documents and tokens; further keys belong to the source that `_target_` names."""


class Objective(ComponentConfig):
    """The inputs that a model reads of a row and the targets that it predicts."""

    target: str = Field(
        default="trainer.objectives.next_token.NextToken",
        alias="_target_",
        min_length=3,
        description="the class to build",
    )


class LoraConfig(ConfigGroup):
    """Adapters of low rank beside linear layers; they alone are trained."""

    rank: Natural = Field(default=0, description="of the adapters; 0 = none, all is trained")
    alpha: Positive = Field(default=16.0, description="their output is scaled by alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] = Field(
        default=["blocks.*"], description="patterns of the names of linear layers"
    )
    adapter: str | None = Field(
        default=None, min_length=1, description="folder in peft's format that they begin with"
    )


class OptimGroup(ConfigGroup):
    """Parameters with settings of their own in the optimiser."""

    match: Annotated[list[str], Field(min_length=1)] = Field(
        description="patterns of their names, as blocks.*.mixer.*"
    )
    learning_rate: Positive | None = Field(
        default=None, description="their peak, which the schedule scales; null = the run's"
    )
    weight_decay: Annotated[Real, Field(ge=0, allow_inf_nan=False)] | None = Field(
        default=None, description="of those among them that decay; null = the run's"
    )


class OptimConfig(ComponentConfig):
    """The optimiser, and the limits of its gradient."""

    target: str = Field(
        default="trainer.optim.adamw.AdamW",
        alias="_target_",
        min_length=3,
        description="the class to build",
    )
    learning_rate: Positive = Field(description="peak learning rate; the schedule scales it")
    betas: tuple[Fraction, Fraction] = Field(description="decay of the first and second moment")
    eps: Positive = Field(description="added to the root of the second moment")
    weight_decay: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = Field(
        description="decoupled, on matrices only"
    )
    max_grad_norm: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = Field(
        description="largest gradient norm; 0 = never clip"
    )
    auxiliary_weight: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = Field(
        1.0, description="of the losses that layers have beside the language loss"
    )
    skip_above: Annotated[Real, Field(ge=0, allow_inf_nan=False)] = Field(
        0.0, description="skip a step whose gradient norm is so many times the usual one; 0 = never"
    )
    max_skipped: Count = Field(default=3, description="steps skipped in a row that end the run")
    freeze: list[str] = Field(
        default=[], description="patterns of the names of parameters that stay as they are"
    )
    groups: list[OptimGroup] = Field(
        default=[], description="parameters with a learning rate or weight decay of their own"
    )

    def settings(self) -> dict[str, Any]:
        """Without what is the run's to know (trainer/step/skip.py), not the optimiser's."""
        apart = {"skip_above", "max_skipped", "freeze"}
        # A class of the user's own need not take what is not asked for.
        if not self.groups:
            apart.add("groups")
        return {key: value for key, value in super().settings().items() if key not in apart}


class ScheduleConfig(ComponentConfig):
    """Learning rate over steps."""

    over: Literal["run", "stage"] = Field(
        default="run", description="what it lasts for: the whole run, or each of stages anew"
    )

    extend: Literal["hold", "restart", "stretch"] | None = Field(
        default=None,
        description=(
            "the learning rate of a run that goes on with other steps; null = none that changes it"
        ),
    )

    def settings(self) -> dict[str, Any]:
        """Without what is the loop's to know (trainer/optim/lengthening.py), not the schedule's."""
        settings = super().settings()
        return {key: value for key, value in settings.items() if key not in ("extend", "over")}


class CheckpointConfig(ConfigGroup):
    """The times at which the state is saved."""

    every: Natural = Field(description="steps between two; 0 = never, not at the end either")
    keep: Count = Field(default=2, description="newest ones kept")
    keep_every: Natural = Field(
        default=0, description="of every so many steps the first one stays for ever; 0 = none"
    )
    keep_best: Natural = Field(
        default=0, description="so many with the best figure stay as well; 0 = none"
    )
    best: Annotated[str, Field(min_length=1)] = Field(
        default="held_out_loss", description="the figure that keep_best goes by, as needle/accuracy"
    )
    best_is: Literal["lowest", "highest"] | None = Field(
        default=None, description="which values are best; null = of a loss the lowest"
    )
    asynchronous: Flag = Field(default=True, description="write while training goes on")


class EvaluationConfig(ConfigGroup):
    """Evaluations while training; every further key is a node, by the name of its figures."""

    model_config = ConfigDict(extra="allow", serialize_by_alias=True)
    __pydantic_extra__: dict[str, ComponentConfig]

    every: Natural = Field(description="steps between two; 0 = never, not at the end either")
    batches: Size = Field(default=4, description="held-out batches each time")
    sample_tokens: Annotated[Natural, Field(le=2**24)] = Field(
        default=0, description="tokens of the sample; 0 = none"
    )
    prompt: str = Field(default="", description="what the sample begins with")
    attention_maps: Annotated[Natural, Field(le=512)] = Field(
        default=0,
        description="held-out tokens whose attention is drawn after the last evaluation; 0 = none",
    )

    @field_validator("attention_maps")
    @classmethod
    def _needs_evaluation(cls, tokens: int, values: ValidationInfo) -> int:
        if tokens and values.data.get("every") == 0:
            raise ValueError(
                "maps are drawn after the last evaluation, but evaluation.every=0; set"
                " evaluation.every too"
            )
        return tokens

    @property
    def nodes(self) -> dict[str, ComponentConfig]:
        """Returns the chosen evaluations by name; of a config that names none, the held-out loss.

        Runs that were recorded before evaluations had names evaluated just that.
        """
        chosen = dict(self.__pydantic_extra__ or {})
        return chosen or {HELD_OUT: ComponentConfig(_target_=HELD_OUT_CLASS)}  # pyright: ignore[reportCallIssue]


class Config(ConfigGroup):
    """A whole run, checked; the same in every rank."""

    name: str = Field(pattern=WORD, max_length=128, description="name of the run")
    steps: Count = Field(description="optimiser steps")
    seed: Seed = Field(description="of weights, order of data, dropout")
    context_length: Count = Field(description="tokens in one packed row")
    batch_tokens: Count = Field(description="tokens in one optimiser step, over all ranks")
    precision: Literal["float32", "float64", "bfloat16"] = Field(
        description="type of the arithmetic"
    )
    prefetch: Natural = Field(
        default=1, description="steps whose batches are read and cut ahead, on a thread; 0 = none"
    )
    run_dir: str | None = Field(
        default=None, min_length=1, description="null = a fresh runs/NAME-DATE-TIME"
    )
    resume: str = Field(
        default="auto", min_length=1, description="auto, never, or a run directory or checkpoint"
    )
    init_from: str | None = Field(
        default=None,
        min_length=1,
        description=(
            "initial weights: a run, a checkpoint, an export, or hf:FOLDER; null = drawn from seed"
        ),
    )
    init_from_strict: Flag = Field(
        default=True, description="refuse initial weights that do not fit the model in everything"
    )
    match: Literal["none", "parameters", "flops"] = Field(
        default="none", description="fit the width to a reference model"
    )
    model: ModelConfig
    mixer: ComponentConfig | None = Field(
        default=None, description="one mixer for all layers; replaces model.pattern"
    )
    position: ComponentConfig
    memory: MemoryConfig = Field(default_factory=lambda: MemoryConfig.model_validate({}))
    cache: CacheConfig = Field(default_factory=lambda: CacheConfig.model_validate({}))
    data: DataConfig
    objective: Objective = Field(default_factory=lambda: Objective.model_validate({}))
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig = ParallelConfig()
    engine: EngineConfig
    launch: LaunchConfig = LaunchConfig()
    log: LogConfig = LogConfig()
    logger: LoggerConfig = Field(default_factory=usual_loggers)
    wandb: WandbConfig = WandbConfig()
    checkpoint: CheckpointConfig
    evaluation: EvaluationConfig
    stages: list[StageConfig] = Field(
        default=[], description="parts of the run, one after another; [] = one, the run itself"
    )

    @property
    def rows(self) -> int:
        """Packed rows in one optimiser step, over all ranks."""
        return self.batch_tokens // self.context_length
