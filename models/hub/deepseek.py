"""DeepSeek-V3: latent attention, experts chosen within groups, shared experts, scaled YaRN."""

from collections.abc import Iterator, Mapping
from math import log
from typing import Any

from models.hub.adapter import SWIGLU
from models.hub.description import LATENT, MIXTURE, TARGET, Description
from models.hub.keys import Keys
from models.hub.llama import MATRICES, Llama
from models.hub.mixture import AUXILIARY
from models.hub.rope import magnitude, rope_entry, rope_parameters
from models.hub.tensors import TensorPiece, reordered, same, stacked

YARN = "models.positions.yarn.Yarn"


class DeepseekV3(Llama):
    """The first layers are dense, the others have routed and shared experts.

    The layers that predict further tokens (num_nextn_predict_layers) are left out.

    Source: DeepSeek-AI 2024 (arXiv:2412.19437).
    """

    model_type = "deepseek_v3"
    model_class = "DeepseekV3ForCausalLM"
    without_effect = (
        "aux_loss_alpha",  # this and seq_aux: of a loss that transformers does not have
        "ep_size",
        "head_dim",  # set from qk_rope_head_dim
        "qk_head_dim",
        "seq_aux",
    )

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """See Llama.heads."""
        heads = model["heads"]
        keys.flag("rope_interleave", True)  # which rows are which; see `mixer`
        keys.demand(
            "num_key_value_heads",
            heads,
            None,
            reason=f"every one of the {heads} heads has keys of its own here",
        )
        settings = {
            TARGET: LATENT,
            "kv_latent": keys.size("kv_lora_rank", 512),
            "nope_dim": keys.size("qk_nope_head_dim", 128),
            "rope_dim": keys.size("qk_rope_head_dim", 64),
            "value_dim": keys.size("v_head_dim", 128),
        }
        if keys.take("q_lora_rank", 1536) is not None:
            settings["q_latent"] = keys.size("q_lora_rank", 1536)
        if keys.flag("attention_bias", False):
            settings["bias"] = True
            settings["out_bias"] = True
        scale = self.scale(keys, settings["nope_dim"] + settings["rope_dim"])
        if scale is not None:
            settings["scale"] = scale
        return settings

    def scale(self, keys: Keys, width: int) -> float | None:
        """Returns the scale of keys of this width, which YaRN may raise; None: 1 / sqrt(width)."""
        entry = rope_entry(keys)
        all_dims = entry.get("mscale_all_dim")
        if entry.get("rope_type", "default") == "default" or not all_dims:
            return None
        return width**-0.5 * magnitude(entry["factor"], all_dims) ** 2

    def position(self, keys: Keys) -> dict[str, Any]:
        """See Llama.position."""
        node = super().position(keys)
        if "rotated_share" in node:
            raise ValueError(
                f"config.json has partial_rotary_factor={node['rotated_share']}, which this kind"
                " of model has not"
            )
        entry = rope_entry(keys)
        if node[TARGET] != YARN and entry.get("mscale_all_dim"):
            raise ValueError("config.json has mscale_all_dim without rope_type=yarn")
        return node

    def feedforwards(
        self, keys: Keys, model: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See Llama.feedforwards."""
        keys.demand("hidden_act", "silu", "swish", reason="experts here have silu")
        keys.demand("moe_layer_freq", 1, reason="experts in some layers only are not offered")
        keys.demand("output_router_logits", False, reason=AUXILIARY)
        keys.demand("scoring_func", "sigmoid", reason="this kind of model has sigmoid")
        keys.demand("topk_method", "noaux_tc", reason="this kind of model has noaux_tc")
        if keys.take("num_nextn_predict_layers", 1):
            keys.notes.append(
                "num_nextn_predict_layers: the layers that predict further tokens are left out"
            )
        model["ffn"] = keys.size("intermediate_size", 18_432)
        experts = {
            TARGET: MIXTURE,
            "experts": keys.size("n_routed_experts", 256),
            "top": keys.size("num_experts_per_tok", 8),
            "shared": keys.size("n_shared_experts", 1),
            "hidden": keys.size("moe_intermediate_size", 2048),
            "score": "sigmoid",
            "normalised": keys.flag("norm_topk_prob", True),
            "scaling": keys.real("routed_scaling_factor", 2.5),
            "choice_bias": True,
            "groups": keys.size("n_group", 8),
            "top_groups": keys.size("topk_group", 4),
        }
        dense = self.dense_layers(keys)
        labels = ["dense"] * dense + ["experts"] * (model["layers"] - dense)
        nodes = {"dense": {TARGET: SWIGLU}, "experts": experts}
        return {label: nodes[label] for label in dict.fromkeys(labels)}, labels

    def dense_layers(self, keys: Keys) -> int:
        """Returns how many layers have no experts."""
        first = keys.take("first_k_dense_replace", 3)
        if type(first) is not int or first < 0:
            raise ValueError(f"config.json has first_k_dense_replace={first!r}: a number of layers")
        return min(first, keys.size("num_hidden_layers"))

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        mixer = model.mixers[0]
        experts = model.feedforwards[-1]
        if mixer[TARGET] != LATENT or experts[TARGET] != MIXTURE:
            raise ValueError("DeepSeek-V3 has latent attention and, in its last layer, experts")
        dense = [node[TARGET] != MIXTURE for node in model.feedforwards]
        return {
            "attention_bias": mixer["bias"],
            "first_k_dense_replace": sum(dense),
            "head_dim": mixer["rope_dim"],
            "intermediate_size": model.sizes.get("ffn", 1),
            "kv_lora_rank": mixer["kv_latent"],
            "moe_intermediate_size": experts["hidden"],
            "n_group": experts["groups"],
            "n_routed_experts": experts["experts"],
            "n_shared_experts": experts["shared"],
            "norm_topk_prob": experts["normalised"],
            "num_experts_per_tok": experts["top"],
            "num_key_value_heads": model.sizes["heads"],
            "num_nextn_predict_layers": 0,
            "output_router_logits": False,
            "q_lora_rank": mixer["q_latent"],
            "qk_nope_head_dim": mixer["nope_dim"],
            "qk_rope_head_dim": mixer["rope_dim"],
            "rope_interleave": True,
            "rope_parameters": self.rope(model),
            "routed_scaling_factor": experts["scaling"],
            "topk_group": experts["top_groups"],
            "v_head_dim": mixer["value_dim"],
        }

    def rope(self, model: Description) -> dict[str, Any]:
        """Returns rope_parameters with what YaRN does to the scale of the dot products."""
        entry = rope_parameters(model.position)
        mixer = model.mixers[0]
        if mixer["scale"] is None:
            return entry
        if entry["rope_type"] != "yarn" or entry["factor"] <= 1:
            raise ValueError(f"scale={mixer['scale']} without YaRN")
        width = mixer["nope_dim"] + mixer["rope_dim"]
        root = (mixer["scale"] * width**0.5) ** 0.5
        unit = 0.1 * log(entry["factor"])
        # Rounded, so that the number comes back that was given.
        entry["mscale_all_dim"] = round((root - 1) / unit, 9)
        multiplied = entry.get("attention_factor")
        if multiplied is not None:
            mscale = round((multiplied * root - 1) / unit, 9)
            if mscale:
                entry["mscale"] = mscale
                del entry["attention_factor"]
        return entry

    def is_unused(self, name: str, content: Mapping[str, Any]) -> bool:
        """See Adapter.is_unused."""
        parts = name.split(".")
        further = parts[:2] == ["model", "layers"] and parts[2].isdigit()
        if further and int(parts[2]) >= content["num_hidden_layers"]:
            return True
        return super().is_unused(name, content)

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.mixer."""
        keys = Keys(content)
        settings = self.heads(keys, {"heads": content["num_attention_heads"]})
        latent = settings["kv_latent"]
        rotated = _rotated_order(settings["rope_dim"], keys.flag("rope_interleave", True))
        head = _behind(settings["nope_dim"], rotated)
        query = []
        for number in range(content["num_attention_heads"]):
            query += [number * len(head) + row for row in head]
        squeezed = {"squeeze.weight": "kv_a_proj_with_mqa.weight"}
        plain = {
            "norm.weight": "kv_a_layernorm.weight",
            "up.weight": "kv_b_proj.weight",
            "out.weight": "o_proj.weight",
        }
        expanded = "q_proj.weight"
        if "q_latent" in settings:
            expanded = "q_b_proj.weight"
            plain["squeeze_q.weight"] = "q_a_proj.weight"
            plain["norm_q.weight"] = "q_a_layernorm.weight"
        if "bias" in settings:
            squeezed["squeeze.bias"] = "kv_a_proj_with_mqa.bias"
            plain["out.bias"] = "o_proj.bias"
            if "q_latent" in settings:
                plain["squeeze_q.bias"] = "q_a_proj.bias"
        yield reordered(f"{ours}q.weight", f"{theirs}{expanded}", query)
        for mine, name in squeezed.items():
            yield reordered(f"{ours}{mine}", f"{theirs}{name}", _behind(latent, rotated))
        for mine, name in plain.items():
            yield same(f"{ours}{mine}", f"{theirs}{name}")

    def feedforward(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.feedforward."""
        if layer < self.dense_layers(Keys(content)):
            yield from super().feedforward(content, layer, ours, theirs)
            return
        yield same(f"{ours}router.weight", f"{theirs}gate.weight")
        yield same(f"{ours}bias", f"{theirs}gate.e_score_correction_bias")
        experts = range(content.get("n_routed_experts", 256))
        for mine, name in MATRICES.items():
            parts = [f"{theirs}experts.{expert}.{name}.weight" for expert in experts]
            yield stacked(f"{ours}experts.{mine}", parts)
            yield same(f"{ours}shared.{mine}.weight", f"{theirs}shared_experts.{name}.weight")


def _rotated_order(width: int, interleaved: bool) -> list[int]:
    """Returns where the rotated channels of ours lie in theirs: even ones first, or as they are."""
    if not interleaved:
        return list(range(width))
    return [*range(0, width, 2), *range(1, width, 2)]


def _behind(count: int, rotated: list[int]) -> list[int]:
    """Returns the order of so many channels as they are, and the rotated ones behind them."""
    return [*range(count), *(count + channel for channel in rotated)]
