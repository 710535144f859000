"""Mistral: Llama with a sliding window."""

from typing import Any

from models.hub.description import Description
from models.hub.keys import Keys
from models.hub.llama import Llama


class Mistral(Llama):
    """Every layer sees the last `sliding_window` tokens, or all where that is null.

    Source: Jiang et al. 2023 (arXiv:2310.06825).
    """

    model_type = "mistral"
    model_class = "MistralForCausalLM"

    def window(self, keys: Keys) -> int | None:
        """See Llama.window."""
        return keys.take("sliding_window", 4096)

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        return {"sliding_window": model.mixers[0].get("window")}

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """See Llama.biases."""
        return False, False
