"""Decoders whose feed-forward layers are mixtures of experts: Mixtral and gpt-oss."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.description import MIXTURE, TARGET, Description
from models.hub.keys import Keys
from models.hub.llama import FULL, SLIDING, Llama, windows
from models.hub.rope import position_of
from models.hub.tensors import TensorPiece, interleaved, same, stacked, transposed

RELEASED_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
AUXILIARY = (
    "the balancing loss over all routers of a model at once is not offered; set it to false, and"
    " model.feedforwards.experts.balance for one of each layer"
)


def expert_sizes(model: Description) -> dict[str, Any]:
    """Returns the keys of config.json for the experts of a model, by the words of Mixtral.

    Raises:
        ValueError: the first feed-forward layer is no mixture.
    """
    node = model.feedforwards[0]
    if node[TARGET] != MIXTURE:
        raise ValueError(f"feedforward {node[TARGET]} is no mixture of experts")
    return {
        "intermediate_size": node["hidden"],
        "num_experts_per_tok": node["top"],
        "num_local_experts": node["experts"],
        "output_router_logits": False,
    }


class Mixtral(Llama):
    """Every token visits its best two of eight SwiGLU layers.

    Source: Jiang et al. 2024 (arXiv:2401.04088).
    """

    model_type = "mixtral"
    model_class = "MixtralForCausalLM"
    without_effect = ("router_aux_loss_coef",)  # where output_router_logits is false
    theta = 1_000_000.0
    norm_eps = 1e-5

    def window(self, keys: Keys) -> int | None:
        """See Llama.window."""
        return keys.take("sliding_window", None)

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """See Llama.biases."""
        return False, False

    def feedforwards(
        self, keys: Keys, model: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See Llama.feedforwards."""
        keys.demand("output_router_logits", False, reason=AUXILIARY)
        keys.demand(
            "router_jitter_noise", 0.0, reason="noise on what the experts read is not offered"
        )
        keys.demand("hidden_act", "silu", "swish", reason="experts here have silu")
        model["ffn"] = keys.size("intermediate_size")
        node = {
            TARGET: MIXTURE,
            "experts": keys.size("num_local_experts", 8),
            "top": keys.size("num_experts_per_tok", 2),
            "hidden": model["ffn"],
            **self.experts(keys),
        }
        return {"experts": node}, ["experts"]

    def experts(self, keys: Keys) -> dict[str, Any]:
        """Returns further settings of the mixtures."""
        return {}

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        return {
            **expert_sizes(model),
            "router_jitter_noise": 0.0,
            "sliding_window": model.mixers[0].get("window"),
        }

    def feedforward(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.feedforward."""
        theirs = theirs.replace("mlp.", "block_sparse_moe.")
        yield same(f"{ours}router.weight", f"{theirs}gate.weight")
        experts = range(content.get("num_local_experts", 8))
        for mine, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            parts = [f"{theirs}experts.{expert}.{name}.weight" for expert in experts]
            yield stacked(f"{ours}experts.{mine}", parts)


class GptOss(Mixtral):
    """Sinks in attention, windows in every other layer, YaRN, experts with biases and clamps.

    Source: OpenAI 2025 (arXiv:2508.10925).
    """

    model_type = "gpt_oss"
    model_class = "GptOssForCausalLM"
    without_effect = (
        "experts_per_token",  # an older name of num_experts_per_tok, beside it
        "initial_context_length",
        "router_aux_loss_coef",
    )
    theta = 150_000.0
    head_width = 64

    def window(self, keys: Keys) -> int | None:
        """See Llama.window."""
        return keys.take("sliding_window", 128)

    def position(self, keys: Keys) -> dict[str, Any]:
        """See Llama.position; a file without rotary settings means those of the release."""
        if keys.content.get("rope_parameters") or keys.content.get("rope_scaling"):
            return super().position(keys)
        theta = keys.real("rope_theta", self.theta)
        return position_of({**RELEASED_ROPE, "rope_theta": theta}, keys)

    def layer_types(self, keys: Keys, layers: int, window: int | None) -> list[str]:
        """See Llama.layer_types."""
        rule = [FULL if layer % 2 else SLIDING for layer in range(layers)]
        return keys.layer_types(layers, rule, (FULL, SLIDING))

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """See Llama.heads."""
        return {**super().heads(keys, model), "sink": True}

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """See Llama.biases."""
        bias = keys.flag("attention_bias", True)
        return bias, bias

    def experts(self, keys: Keys) -> dict[str, Any]:
        """See Mixtral.experts."""
        return {
            "activation": "clamped_swiglu",
            "expert_bias": True,
            "router_bias": True,
            "swiglu_alpha": keys.real("swiglu_alpha", 1.702),
            "swiglu_limit": keys.real("swiglu_limit", 7.0),
        }

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        kinds, window = windows(model)
        return {
            **expert_sizes(model),
            "attention_bias": model.mixers[0].get("bias", False),
            "layer_types": kinds,
            "sliding_window": window,
            "swiglu_alpha": model.feedforwards[0]["swiglu_alpha"],
            "swiglu_limit": model.feedforwards[0]["swiglu_limit"],
        }

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.mixer."""
        yield from super().mixer(content, layer, ours, theirs)
        yield same(f"{ours}tables.logit", f"{theirs}sinks")

    def feedforward(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.feedforward."""
        for leaf in ("weight", "bias"):
            yield same(f"{ours}router.{leaf}", f"{theirs}router.{leaf}")
        ours = f"{ours}experts."
        theirs = f"{theirs}experts."
        yield interleaved([f"{ours}gate", f"{ours}up"], f"{theirs}gate_up_proj", transpose=True)
        yield interleaved([f"{ours}gate_bias", f"{ours}up_bias"], f"{theirs}gate_up_proj_bias")
        yield transposed(f"{ours}down", f"{theirs}down_proj")
        yield same(f"{ours}down_bias", f"{theirs}down_proj_bias")
