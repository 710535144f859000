"""Base classes of the schema: a group of settings, and a node that names a class."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ConfigGroup(BaseModel):
    """A group of settings: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ComponentConfig(ConfigGroup):
    """A class named by `_target_`, with settings that its constructor's signature checks."""

    model_config = ConfigDict(extra="allow", populate_by_name=True, serialize_by_alias=True)

    target: str = Field(alias="_target_", min_length=3, description="the class to build")

    def settings(self) -> dict[str, Any]:
        """Every key of the node but `_target_`, as plain data."""
        return self.model_dump(by_alias=True, exclude={"target"})
