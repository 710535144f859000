"""The adapters by model_type, as config.json names it."""

import difflib
from collections.abc import Mapping
from typing import Any

from models.hub.adapter import Adapter
from models.hub.bert import Bert
from models.hub.deepseek import DeepseekV3
from models.hub.gemma import Gemma2, Gemma3
from models.hub.gpt2 import GPT2
from models.hub.llama import Llama
from models.hub.mamba import Mamba2Hub
from models.hub.mistral import Mistral
from models.hub.mixture import GptOss, Mixtral
from models.hub.qwen import Qwen2, Qwen3
from models.hub.qwen_next import Qwen3Next
from models.hub.rwkv import Rwkv7Hub

KNOWN: tuple[Adapter, ...] = (
    Llama(),
    Mistral(),
    Qwen2(),
    Qwen3(),
    Gemma2(),
    Gemma3(),
    GPT2(),
    Mamba2Hub(),
    Mixtral(),
    GptOss(),
    DeepseekV3(),
    Bert(),
    Qwen3Next(),
    Rwkv7Hub(),
)
ADAPTERS = {adapter.model_type: adapter for adapter in KNOWN}


def adapter_of(content: Mapping[str, Any]) -> Adapter:
    """Returns the adapter for a config.json.

    Raises:
        ValueError: there is none, or the model is code of its own repository.
    """
    known = ", ".join(ADAPTERS)
    if content.get("auto_map"):
        raise ValueError(
            f"config.json has auto_map={str(content['auto_map'])[:60]}: such a model is code of its"
            " repository (trust_remote_code), which is never run; if the model is one of"
            f" transformers' own, remove the key in a copy of the folder; known: {known}"
        )
    if content.get("quantization_config"):
        raise ValueError(
            "config.json has quantization_config: quantised weights are not read; take the folder"
            " of the model before it was quantised"
        )
    model_type = content.get("model_type")
    adapter = ADAPTERS.get(str(model_type))
    if adapter is None:
        close = difflib.get_close_matches(str(model_type), ADAPTERS, n=1, cutoff=0.0)
        raise ValueError(
            f"config.json has model_type={model_type!r}, which no adapter reads; the nearest is"
            f" {close[0]}, known: {known}"
        )
    return adapter
