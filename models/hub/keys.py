"""Reads a config.json key by key: each is used, known to change nothing, or refused by its name."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Keys of any model that have no part in its numbers: names of tokens, settings of generation and
# of the library, the deviation of initial weights that are not drawn here.
WITHOUT_EFFECT = (
    "_attn_implementation_autoset",
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "decoder_start_token_id",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "return_dict",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
MISSING = object()


class Keys:
    """The keys of a config.json.

    Args:
        content: the config.json.

    Attributes:
        notes: sentences about what trains otherwise than there, for the log.
    """

    def __init__(self, content: Mapping[str, Any]):
        self.content = dict(content)
        self.used: set[str] = set()
        self.notes: list[str] = []

    def take(self, key: str, default: Any = MISSING) -> Any:
        """Returns the value of a key.

        Raises:
            ValueError: the key is missing and has no default.
        """
        self.used.add(key)
        value = self.content.get(key, default)
        if value is MISSING:
            raise ValueError(f"config.json has no {key}, which this kind of model needs")
        return value

    def size(self, key: str, default: Any = MISSING) -> int:
        """Returns a whole number of 1 or more."""
        value = self.take(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"config.json has {key}={value!r}; a whole number from 1 on is needed")
        return value

    def real(self, key: str, default: Any = MISSING) -> float:
        """Returns a number above 0."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not value > 0:
            raise ValueError(f"config.json has {key}={value!r}; a number above 0 is needed")
        return float(value)

    def flag(self, key: str, default: Any = MISSING) -> bool:
        """Returns true or false."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise ValueError(f"config.json has {key}={value!r}; true or false is needed")
        return value

    def demand(self, key: str, *allowed: Any, reason: str) -> None:
        """Accepts a key only with one of these values; one that is missing passes.

        Raises:
            ValueError: it has another value; `reason` says why that cannot be honoured.
        """
        value = self.take(key, allowed[0])
        if value not in allowed or (isinstance(value, bool) and value not in (*allowed,)):
            raise ValueError(f"config.json has {key}={value!r}: {reason}")

    def dropout(self, *keys: str) -> None:
        """Notes shares of dropout: a run here has none, which changes nothing but training."""
        for key in keys:
            share = self.take(key, 0.0)
            if share:
                self.notes.append(f"{key}={share}: training here has no dropout")

    def activation(self, key: str, default: str) -> str:
        """Returns our name of an activation."""
        value = self.take(key, default)
        if value not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(
                f"config.json has {key}={value!r}, which is not offered; known: {known}"
            )
        return ACTIVATIONS[value]

    def layer_types(self, layers: int, default: Sequence[str], known: Sequence[str]) -> list[str]:
        """Returns the kind of every layer: layer_types, or what older files leave to a rule.

        Args:
            default: what the rule gives.
            known: kinds that are offered.
        """
        kinds = self.take("layer_types", None)
        kinds = list(default) if kinds is None else kinds
        if len(kinds) != layers or any(kind not in known for kind in kinds):
            raise ValueError(
                f"config.json has layer_types={str(kinds)[:60]} for {layers} layers; known:"
                f" {', '.join(known)}"
            )
        return kinds

    def finish(self, without_effect: Iterable[str] = ()) -> None:
        """Refuses keys that nobody has read.

        Args:
            without_effect: further keys that change nothing in this kind of model.

        Raises:
            ValueError: there is such a key, and its value says something.
        """
        known = self.used.union(WITHOUT_EFFECT, without_effect)
        for key, value in sorted(self.content.items()):
            if key not in known and value is not None:
                raise ValueError(
                    f"config.json has {key}={str(value)[:60]}, which this adapter does not know;"
                    " remove the key in a copy of the folder if it changes nothing"
                )
