"""Gemma 2 and 3: gains of 1 + weight, norms before and behind every layer, alternating windows."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.description import Description
from models.hub.keys import Keys
from models.hub.llama import FULL, SLIDING, Llama, windows
from models.hub.rope import position_of, rope_entry, rope_parameters
from models.hub.tensors import TensorPiece, same

NORMS = {
    "mixer_norm": "input_layernorm",
    "mixer_post_norm": "post_attention_layernorm",
    "feedforward_norm": "pre_feedforward_layernorm",
    "feedforward_post_norm": "post_feedforward_layernorm",
}


class Gemma2(Llama):
    """Soft caps on the logits of attention and of the head; every other layer has a window.

    Source: Gemma Team 2024 (arXiv:2408.00118).
    """

    model_type = "gemma2"
    model_class = "Gemma2ForCausalLM"
    without_effect = ("hidden_act", "cache_implementation", "_sliding_window_pattern")
    tied = True
    head_width = 256
    activation_key = "hidden_activation"
    default_activation = "gelu_pytorch_tanh"
    caps: tuple[float | None, float | None] = (
        50.0,
        30.0,
    )  # of attention and of the head, where config.json does not say
    period = 2  # the last layer of so many sees everything

    def stack(self, keys: Keys) -> dict[str, Any]:
        """See Llama.stack."""
        keys.demand(
            "use_bidirectional_attention",
            None,
            False,
            reason="attention that sees ahead is not offered",
        )
        settings: dict[str, Any] = {
            "norm": "rms_offset",
            "norm_place": "both",
            "embedding_scale": keys.size("hidden_size") ** 0.5,
        }
        cap = keys.take("final_logit_softcapping", self.caps[1])
        if cap is not None:
            settings["logit_cap"] = cap
        return settings

    def window(self, keys: Keys) -> int | None:
        """See Llama.window."""
        return keys.size("sliding_window", 4096)

    def layer_types(self, keys: Keys, layers: int, window: int | None) -> list[str]:
        """See Llama.layer_types."""
        period = keys.take("sliding_window_pattern", None) or self.period
        rule = [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]
        return keys.layer_types(layers, rule, (FULL, SLIDING))

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """See Llama.heads."""
        settings = super().heads(keys, model)
        settings["scale"] = keys.real("query_pre_attn_scalar", 256) ** -0.5
        cap = keys.take("attn_logit_softcapping", self.caps[0])
        if cap is not None:
            settings["cap"] = cap
        return settings

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        kinds, window = windows(model)
        mixer = model.mixers[0]
        scale = mixer.get("scale") or mixer.get("head_width", 1) ** -0.5
        return {
            "attention_bias": mixer.get("bias", False),
            "attn_logit_softcapping": mixer.get("cap"),
            "final_logit_softcapping": model.stack.get("logit_cap"),
            "layer_types": kinds,
            "query_pre_attn_scalar": round(scale**-2),
            "sliding_window": window or 4096,
        }

    def norms(self, ours: str, theirs: str) -> Iterator[TensorPiece]:
        """See Llama.norms."""
        for mine, name in NORMS.items():
            yield same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")


class Gemma3(Gemma2):
    """The text model: normed queries and keys, five windows to one full layer, two RoPE bases.

    Source: Gemma Team 2025 (arXiv:2503.19786).
    """

    model_type = "gemma3_text"
    model_class = "Gemma3ForCausalLM"
    caps = (None, None)
    period = 6
    theta = 1_000_000.0

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """See Llama.heads."""
        settings = super().heads(keys, model)
        return {**settings, "qk_norm": "rms_offset", "qk_norm_eps": model["norm_eps"]}

    def mixers(
        self, keys: Keys, model: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See Llama.mixers."""
        mixers, pattern = super().mixers(keys, model)
        local, _ = self.entries(keys)
        if "sliding" in mixers:
            mixers["sliding"]["position"] = position_of(local, keys)
        return mixers, pattern

    def position(self, keys: Keys) -> dict[str, Any]:
        """See Llama.position."""
        return position_of(self.entries(keys)[1], keys, self.theta)

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        content = super().write_more(model)
        places = {}
        for kind, mixer in zip(content["layer_types"], model.mixers, strict=True):
            places.setdefault(kind, rope_parameters(mixer["position"]))
        full = places.setdefault(FULL, rope_parameters(model.position))
        places.setdefault(SLIDING, full)
        return {**content, "rope_parameters": places}

    def entries(self, keys: Keys) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the rotary settings of layers with a window, and of those without."""
        local_theta = keys.take("rope_local_base_freq", 10_000.0)
        entry = rope_entry(keys)
        if SLIDING in entry or FULL in entry:
            return entry.get(SLIDING, {}), entry.get(FULL, {})
        return {"rope_theta": local_theta}, entry

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.mixer."""
        yield from super().mixer(content, layer, ours, theirs)
        for name in ("q_norm", "k_norm"):
            yield same(f"{ours}{name}.weight", f"{theirs}{name}.weight")
