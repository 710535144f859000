"""Base of the adapters: what a kind of Hugging Face model is in ours, setting by setting."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.hub.description import Description
from models.hub.keys import Keys
from models.hub.tensors import TensorPiece

SWIGLU = "models.feedforward.SwiGLU"
NO_FEED_FORWARD = "models.feedforward.NoFeedForward"
NO_POSITION = "models.positions.none.NoPosition"


@dataclass
class Architecture:
    """A model as our config describes it.

    Attributes:
        model: the node `model`.
        position: the node `position`.
        notes: sentences about what trains otherwise than there.
    """

    model: dict[str, Any]
    position: dict[str, Any]
    notes: list[str] = field(default_factory=list)


class Adapter:
    """Translates the config.json and the names of tensors of one model_type.

    Attributes:
        model_type: as config.json has it.
        model_class: whose weights and names these are, in transformers.
        without_effect: keys of its config.json that change nothing.
        dropouts: keys with shares of dropout, which a run here does without.
        unused: parts of names of tensors that hold nothing of the model, in older files.
        base_prefix: what names of all tensors but the head's begin with; a folder of the model
            without its head leaves it out.
    """

    model_type: str
    model_class: str
    without_effect: tuple[str, ...] = ()
    dropouts: tuple[str, ...] = ("attention_dropout",)
    unused: tuple[str, ...] = ("rotary_emb.inv_freq",)
    base_prefix = "model."

    def architecture(self, content: Mapping[str, Any]) -> Architecture:
        """Translates a config.json.

        Raises:
            ValueError: a key with a value that cannot be honoured, or a key that is not known.
        """
        keys = Keys(content)
        result = self.read(keys)
        keys.finish(self.without_effect)
        result.notes += keys.notes
        return result

    def read(self, keys: Keys) -> Architecture:
        """Reads every key that has a part in the model."""
        raise NotImplementedError(f"{type(self).__name__} must define `read`")

    def write(self, model: Description) -> dict[str, Any]:
        """Returns the config.json that comes nearest to a model of ours.

        Whether it is that model exactly is found out by reading it again.

        Raises:
            ValueError: there is nothing near.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `write`")

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """Yields the names of all tensors, in the order of the model."""
        raise NotImplementedError(f"{type(self).__name__} must define `pieces`")

    def is_unused(self, name: str, content: Mapping[str, Any]) -> bool:
        """Tells whether a tensor of a folder holds nothing of the model."""
        return any(part in name for part in self.unused)

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """Returns names of ours that share the tensor of another."""
        return {}
