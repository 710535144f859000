"""Schema of one stage of a run: what it sets in place of the run's own settings."""

from typing import Any, Literal

from pydantic import Field, field_serializer

from trainer.config.machine_schema import WORD, ParallelConfig
from trainer.config.nodes import ConfigGroup
from trainer.config.scalars import Count, Positive


class StageConfig(ConfigGroup):
    """One stage; whatever it leaves out is the run's own setting."""

    name: str | None = Field(
        default=None, pattern=WORD, max_length=64, description="for the log; null = its number"
    )
    steps: Count | None = Field(default=None, description="optimiser steps of this stage alone")
    context_length: Count | None = Field(default=None, description="tokens in one packed row")
    batch_tokens: Count | None = Field(default=None, description="tokens in one optimiser step")
    learning_rate: Positive | None = Field(default=None, description="peak of this stage")
    position: dict[str, Any] | None = Field(
        default=None, description="settings over those of position=; _target_ replaces it"
    )
    data: dict[str, Any] | None = Field(
        default=None, description="settings over those of data=; _target_ replaces it"
    )
    parallel: ParallelConfig | None = Field(
        default=None, description="settings over those of parallel"
    )
    checkpointing: Literal["none", "full", "selective"] | None = Field(
        default=None, description="in place of engine.checkpointing: long rows need more memory"
    )

    @field_serializer("parallel")
    def _only_what_is_set(self, parallel: ParallelConfig | None) -> dict[str, Any] | None:
        # A default that was written down would count as set when the record is read again.
        return None if parallel is None else parallel.model_dump(exclude_unset=True)
