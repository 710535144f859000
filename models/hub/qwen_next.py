"""Qwen3-Next: three layers of Gated DeltaNet to one of gated attention, and mixtures of experts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.hub.adapter import SWIGLU
from models.hub.description import MIXER, MIXTURE, TARGET, Description
from models.hub.keys import Keys
from models.hub.llama import FULL
from models.hub.mixture import AUXILIARY
from models.hub.qwen import Qwen3
from models.hub.rope import position_of, rope_entry
from models.hub.tensors import TensorPiece, same, stacked, taps_in_one

DELTA = "models.recurrent.delta.GatedDeltaNet"
LINEAR = "linear_attention"
PERIOD = 4  # the last of so many layers has attention
ROTATED = 0.25
UNIT_EPS = 1e-6  # fixed in their code
DELTA_SIZES = {
    "heads": ("linear_num_value_heads", 32),
    "key_heads": ("linear_num_key_heads", 16),
    "key_width": ("linear_key_head_dim", 128),
    "value_width": ("linear_value_head_dim", 128),
    "conv_kernel": ("linear_conv_kernel_dim", 4),
}
EXPERT_SIZES = {
    "experts": ("num_experts", 512),
    "top": ("num_experts_per_tok", 10),
    "hidden": ("moe_intermediate_size", 512),
    "shared_hidden": ("shared_expert_intermediate_size", 512),
}
MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Qwen3Next(Qwen3):
    """A hybrid whose attention has a gate per channel and rotates a quarter of each head.

    Source: Qwen Team 2025 (Qwen3-Next), Yang et al. 2024 (arXiv:2412.06464), Qiu et al. 2025
    (arXiv:2505.06708).
    """

    model_type = "qwen3_next"
    model_class = "Qwen3NextForCausalLM"
    # Where output_router_logits and use_sliding_window are false.
    without_effect = ("max_window_layers", "router_aux_loss_coef", "sliding_window")
    unused = (*Qwen3.unused, "mtp.")  # layers that predict further tokens
    head_width = 256

    def stack(self, keys: Keys) -> dict[str, Any]:
        """See Llama.stack."""
        return {"norm": "rms_offset"}

    def position(self, keys: Keys) -> dict[str, Any]:
        """See Llama.position."""
        entry = rope_entry(keys)
        entry.setdefault("partial_rotary_factor", ROTATED)
        return position_of(entry, keys, self.theta)

    def mixers(
        self, keys: Keys, model: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See Llama.mixers."""
        keys.demand("hidden_act", "silu", "swish", reason="its layers have silu here")
        keys.demand("use_sliding_window", False, reason="its attention sees all earlier tokens")
        period = keys.take("full_attention_interval", PERIOD)
        layers = model["layers"]
        rule = [LINEAR if (layer + 1) % period else FULL for layer in range(layers)]
        kinds = keys.layer_types(layers, rule, (FULL, LINEAR))
        heads = {**self.heads(keys, model), "qk_norm": "rms_offset", "gate": True}
        delta: dict[str, Any] = {
            TARGET: DELTA,
            "norm_eps": model["norm_eps"],
            "unit_eps": UNIT_EPS,
        }
        for ours, (theirs, default) in DELTA_SIZES.items():
            delta[ours] = keys.size(theirs, default)
        known = {"full": heads, "delta": delta}
        labels = ["full" if kind == FULL else "delta" for kind in kinds]
        return {label: known[label] for label in known if label in labels}, labels

    def feedforwards(
        self, keys: Keys, model: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """See Llama.feedforwards."""
        keys.demand("output_router_logits", False, reason=AUXILIARY)
        model["ffn"] = keys.size("intermediate_size", 5632)
        mixture: dict[str, Any] = {TARGET: MIXTURE, "shared": 1, "shared_gate": True}
        experts = keys.take("num_experts", 512)
        for ours, (theirs, default) in EXPERT_SIZES.items():
            # Without experts their sizes say nothing.
            mixture[ours] = keys.size(theirs, default) if experts else keys.take(theirs, default)
        mixture["normalised"] = keys.flag("norm_topk_prob", True)
        keys.take("mlp_only_layers", None)
        keys.take("decoder_sparse_step", 1)
        labels = [
            "experts" if _has_experts(keys.content, layer) else "dense"
            for layer in range(model["layers"])
        ]
        known = {"dense": {TARGET: SWIGLU}, "experts": mixture}
        return {label: known[label] for label in known if label in labels}, labels

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        attention = [mixer for mixer in model.mixers if mixer[TARGET] == MIXER]
        deltas = [mixer for mixer in model.mixers if mixer[TARGET] == DELTA]
        mixtures = [node for node in model.feedforwards if node[TARGET] == MIXTURE]
        if not attention or not deltas or not mixtures:
            raise ValueError("a mix of attention, Gated DeltaNet and experts is needed")
        kinds = [FULL if mixer[TARGET] == MIXER else LINEAR for mixer in model.mixers]
        dense = [layer for layer, node in enumerate(model.feedforwards) if node[TARGET] != MIXTURE]
        # What all layers have in common, Llama reads from the first.
        first = Description(
            model.sizes, model.stack, attention, [{"activation": "silu"}], model.position
        )
        content = super().write(first)
        if content["intermediate_size"] is None:
            # Where every layer has experts the width of the others is nowhere in the model.
            del content["intermediate_size"]
        for sizes, node in ((DELTA_SIZES, deltas[0]), (EXPERT_SIZES, mixtures[0])):
            for ours, (theirs, _) in sizes.items():
                content[theirs] = node[ours]
        return {
            **content,
            "layer_types": kinds,
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
            "norm_topk_prob": mixtures[0]["normalised"],
            "output_router_logits": False,
        }

    def write_more(self, model: Description) -> dict[str, Any]:
        """See Llama.write_more."""
        return {"attention_bias": model.mixers[0].get("bias", False)}

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.mixer."""
        if self._kinds(content)[layer] == LINEAR:
            yield from _delta(content, ours, theirs.replace("self_attn.", "linear_attn."))
            return
        heads = content.get("num_attention_heads", 16)
        width = content.get("head_dim", self.head_width)
        for piece in super().mixer(content, layer, ours, theirs):
            leaf = piece.ours[0].removeprefix(f"{ours}q.")
            if leaf == piece.ours[0]:
                yield piece
            else:
                parts = [f"{ours}q.{leaf}", f"{ours}gate.{leaf}"]
                yield by_group(parts, piece.theirs[0], heads, [width, width])

    def feedforward(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """See Llama.feedforward."""
        if not _has_experts(content, layer):
            yield from super().feedforward(content, layer, ours, theirs)
            return
        yield same(f"{ours}router.weight", f"{theirs}gate.weight")
        experts = range(content.get("num_experts", 512))
        for mine, name in MATRICES.items():
            parts = [f"{theirs}experts.{expert}.{name}.weight" for expert in experts]
            yield stacked(f"{ours}experts.{mine}", parts)
            yield same(f"{ours}shared.{mine}.weight", f"{theirs}shared_expert.{name}.weight")
        yield same(f"{ours}shared_gate.weight", f"{theirs}shared_expert_gate.weight")

    def _kinds(self, content: Mapping[str, Any]) -> list[str]:
        """Returns the kind of every layer."""
        period = content.get("full_attention_interval", PERIOD)
        layers = range(content.get("num_hidden_layers", 48))
        rule = [LINEAR if (layer + 1) % period else FULL for layer in layers]
        return content.get("layer_types") or rule


def _has_experts(content: Mapping[str, Any], layer: int) -> bool:
    """Tells whether a layer has a mixture of experts, and not a dense feed-forward layer."""
    if layer in (content.get("mlp_only_layers") or ()) or not content.get("num_experts", 512):
        return False
    return (layer + 1) % content.get("decoder_sparse_step", 1) == 0


def _delta(content: Mapping[str, Any], ours: str, theirs: str) -> Iterator[TensorPiece]:
    """Yields the pieces of a Gated DeltaNet, whose projections lie together by head of keys."""
    sizes = {mine: content.get(name, default) for mine, (name, default) in DELTA_SIZES.items()}
    groups = sizes["key_heads"]
    values = sizes["heads"] // groups
    key_width = sizes["key_width"]
    value_width = values * sizes["value_width"]
    parts = [f"{ours}{name}.weight" for name in ("q", "k", "v", "gate")]
    yield by_group(
        parts,
        f"{theirs}in_proj_qkvz.weight",
        groups,
        [key_width, key_width, value_width, value_width],
    )
    parts = [f"{ours}{name}.weight" for name in ("step", "forget")]
    yield by_group(parts, f"{theirs}in_proj_ba.weight", groups, [values, values])
    taps = [f"{ours}{name}_taps.weight" for name in ("q", "k", "v")]
    widths = [groups * key_width, groups * key_width, groups * value_width]
    yield taps_in_one(taps, f"{theirs}conv1d.weight", widths)
    yield same(f"{ours}pace", f"{theirs}A_log")
    yield same(f"{ours}delay", f"{theirs}dt_bias")
    yield same(f"{ours}norm.weight", f"{theirs}norm.weight")
    yield same(f"{ours}out.weight", f"{theirs}out_proj.weight")


def by_group(ours: Sequence[str], theirs: str, groups: int, sizes: Sequence[int]) -> TensorPiece:
    """Pairs one tensor of groups of rows, each with rows of every part, with the parts.

    Args:
        groups: G.
        sizes: rows of each part in a group.
    """

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        if tensors[0].shape[0] != groups * sum(sizes):
            raise ValueError(f"{theirs} has not {groups} groups of {sum(sizes)} rows")
        grouped = tensors[0].unflatten(0, (groups, -1))
        return [part.flatten(0, 1) for part in grouped.split(list(sizes), 1)]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        parts = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return [torch.cat(parts, 1).flatten(0, 1)]

    return TensorPiece(tuple(ours), (theirs,), read, write)
