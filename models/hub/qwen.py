"""Qwen2 and Qwen3: Llama with biases, or with normed queries and keys."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.description import Description
from models.hub.keys import Keys
from models.hub.llama import FULL, SLIDING, Llama, windows
from models.hub.tensors import TensorPiece, same


class Qwen2(Llama):
    """Queries, keys and values have biases; the upper layers may have a sliding window.

    Source: Yang et al. 2024 (arXiv:2407.10671).
    """

    model_type = "qwen2"
    model_class = "Qwen2ForCausalLM"
    without_effect = ("max_window_layers",)  # where there are layer_types

    def window(self, keys: Keys) -> int | None:
        """See Llama.window."""
        window = keys.take("sliding_window", 4096)
        return window if keys.flag("use_sliding_window", False) else None

    def layer_types(self, keys: Keys, layers: int, window: int | None) -> list[str]:
        """See Llama.layer_types."""
        first = keys.take("max_window_layers", 28)
        rule = [FULL] * layers
        if window is not None:
            rule[first:] = [SLIDING] * (layers - min(first, layers))
        kinds = keys.layer_types(layers, rule, (FULL, SLIDING))
        if SLIDING in kinds and window is None:
            raise ValueError(
                "config.json has sliding_attention in layer_types and use_sliding_window=false"
            )
        return kinds

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        kinds, window = windows(model)
        return {
            "layer_types": kinds,
            "sliding_window": window,
            "use_sliding_window": window is not None,
        }

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """See Llama.biases."""
        return True, False


class Qwen3(Qwen2):
    """Queries and keys are normed head by head, and the width of a head is a setting of its own.

    Source: Yang et al. 2025 (arXiv:2505.09388).
    """

    model_type = "qwen3"
    model_class = "Qwen3ForCausalLM"
    head_width = 128

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """See Llama.heads."""
        settings = super().heads(keys, model)
        return {**settings, "qk_norm": "rms", "qk_norm_eps": model["norm_eps"]}

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        return {**super().write_more(model), "attention_bias": model.mixers[0].get("bias", False)}

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """See Llama.biases."""
        bias = keys.flag("attention_bias", False)
        return bias, bias

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.mixer."""
        yield from super().mixer(content, layer, ours, theirs)
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}{name}.weight", f"{theirs}{name}.weight")
