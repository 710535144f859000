"""RWKV-7 as flash-linear-attention names it: time mix and channel mix between norms with a bias."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.hub.adapter import NO_POSITION, Adapter, Architecture
from models.hub.description import DECODER, TARGET, Description
from models.hub.keys import Keys
from models.hub.tensors import TensorPiece, same

TIME_MIX = "models.recurrent.rwkv7.Rwkv7"
CHANNEL_MIX = "models.recurrent.rwkv_layers.ChannelMix"
LOOKS = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")  # in the order of ours
MATRICES = {"r": "r_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
VECTORS = {"direction": "k_k", "strength": "k_a", "bonus": "r_k"}
RANKS = {
    "decay_rank": ("decay_low_rank_dim", 64),
    "gate_rank": ("gate_low_rank_dim", 128),
    "rate_rank": ("a_low_rank_dim", 64),
    "value_rank": ("v_low_rank_dim", 16),
}
MAPS = {"decay": "w_lora", "rate": "a_lora", "gate": "g_lora", "pull": "v_lora"}
# fla's fused norm adds it to the squared length; its plain one adds nothing that counts.
FUSED_EPS = 1e-6


class Rwkv7Hub(Adapter):
    """A state per head that decays and is corrected, and values drawn toward the first layer's.

    Source: Peng et al. 2025 (arXiv:2503.14456), in the form of fla (flash-linear-attention).
    """

    model_type = "rwkv7"
    model_class = "RWKV7ForCausalLM"
    # How fla computes, and how it draws initial weights.
    without_effect = (
        "attn_mode",
        "fuse_cross_entropy",
        "fuse_linear_cross_entropy",
        "hidden_ratio",
        "use_l2warp",
    )

    def read(self, keys: Keys) -> Architecture:
        """See Adapter.read."""
        keys.demand("hidden_act", "sqrelu", reason="the channel mix squares what is above 0")
        keys.demand("norm_bias", True, reason="norms without a bias are not offered")
        keys.demand("attn", None, reason="softmax layers among those of RWKV-7 are not offered")
        if keys.flag("use_l2warp", True):
            keys.notes.append("use_l2warp=true: training here adds no pull on the largest logits")
        width = keys.size("hidden_size", 2048)
        layers = keys.size("num_hidden_layers", 24)
        heads = _heads(keys, width)
        if keys.take("value_dim", None) not in (None, width, [width] * layers):
            raise ValueError("config.json has a value_dim other than hidden_size: not offered")
        ffn = keys.take("intermediate_size", None)
        if ffn is None:
            ffn = -(-int(width * (keys.take("hidden_ratio", None) or 4)) // 32) * 32
        eps = keys.real("norm_eps", 1e-5)
        mixer: dict[str, Any] = {TARGET: TIME_MIX, "norm_eps": eps}
        for ours, (theirs, default) in RANKS.items():
            mixer[ours] = keys.size(theirs, default)
        if keys.flag("fuse_norm", True):
            mixer["direction_eps"] = FUSED_EPS
        model = {
            TARGET: DECODER,
            "width": width,
            "layers": layers,
            "heads": heads,
            "ffn": ffn,
            "vocabulary": keys.size("vocab_size", 32_000),
            "tie_embeddings": keys.flag("tie_word_embeddings", False),
            "norm": "layer",
            "norm_eps": eps,
            "embedding_norm": keys.flag("norm_first", True),
            "mixers": {"rwkv7": mixer},
            "pattern": ["rwkv7"],
            "feedforwards": {"channel_mix": {TARGET: CHANNEL_MIX}},
            "feedforward_pattern": ["channel_mix"],
        }
        return Architecture(model, {TARGET: NO_POSITION})

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        sizes = model.sizes
        mixer = model.mixers[0]
        if mixer[TARGET] != TIME_MIX:
            raise ValueError(f"mixer._target_={mixer[TARGET]}: RWKV-7 has its time mix")
        ranks = {theirs: mixer[ours] or mixer["rank"] for ours, (theirs, _) in RANKS.items()}
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "hidden_size": sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "head_dim": sizes["width"] // sizes["heads"],
            "num_heads": sizes["heads"],
            "value_dim": [sizes["width"]] * sizes["layers"],
            "intermediate_size": sizes["ffn"],
            "vocab_size": sizes["vocabulary"],
            "tie_word_embeddings": model.stack["tie_embeddings"],
            "max_position_embeddings": sizes["context_length"],
            "norm_eps": model.stack["norm_eps"],
            "norm_first": model.stack["embedding_norm"],
            "norm_bias": True,
            "fuse_norm": mixer["direction_eps"] > 0,
            "hidden_act": "sqrelu",
            **ranks,
        }

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See Adapter.ties."""
        tied = content.get("tie_word_embeddings", False)
        return {"head.weight": "embed.weight"} if tied else {}

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """See Adapter.pieces."""
        yield same("embed.weight", "model.embeddings.weight")
        if content.get("norm_first", True):
            yield from _affine("embed_norm", "model.layers.0.pre_norm")
        for layer in range(content.get("num_hidden_layers", 24)):
            ours = f"blocks.{layer}."
            theirs = f"model.layers.{layer}."
            yield from _affine(f"{ours}mixer_norm", f"{theirs}attn_norm")
            yield from _time_mix(f"{ours}mixer.", f"{theirs}attn.", first=layer == 0)
            yield from _affine(f"{ours}feedforward_norm", f"{theirs}ffn_norm")
            yield same(f"{ours}feedforward.look", f"{theirs}ffn.x_k")
            yield same(f"{ours}feedforward.up.weight", f"{theirs}ffn.key.weight")
            yield same(f"{ours}feedforward.down.weight", f"{theirs}ffn.value.weight")
        yield from _affine("norm", "model.norm")
        if not self.ties(content):
            yield same("head.weight", "lm_head.weight")


def _heads(keys: Keys, width: int) -> int:
    """Returns the number of heads, which num_heads or head_dim gives."""
    head_width = keys.take("head_dim", 64)
    heads = keys.take("num_heads", None)
    if head_width is None:
        head_width = width // keys.size("num_heads")
    if heads is None:
        heads = width // head_width
    if heads * head_width != width:
        raise ValueError(
            f"config.json has num_heads={heads} and head_dim={head_width} for hidden_size={width}"
        )
    return heads


def _time_mix(ours: str, theirs: str, *, first: bool) -> Iterator[TensorPiece]:
    """Yields the pieces of a time mix; the first layer has no pull toward itself."""
    yield _looks(f"{ours}look", [theirs + name for name in LOOKS])
    for mine, name in MATRICES.items():
        yield same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
    for mine, name in VECTORS.items():
        yield same(ours + mine, theirs + name)
    for mine, name in MAPS.items():
        if mine == "pull" and first:
            continue
        yield same(f"{ours}{mine}.down.weight", f"{theirs}{name}.lora.0.weight")
        yield same(f"{ours}{mine}.up.weight", f"{theirs}{name}.lora.2.weight")
        if mine != "gate":
            yield same(f"{ours}{mine}.up.bias", f"{theirs}{name}.lora.2.bias")
    yield from _affine(f"{ours}norm", f"{theirs}g_norm")


def _looks(ours: str, theirs: Sequence[str]) -> TensorPiece:
    """Pairs [6, W] with six tensors [1, 1, W]."""

    def read(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [torch.cat([tensor.flatten(0, 1) for tensor in tensors])]

    def write(tensors: Sequence[Tensor]) -> list[Tensor]:
        return [look.view(1, 1, -1) for look in tensors[0]]

    return TensorPiece((ours,), tuple(theirs), read, write)


def _affine(ours: str, theirs: str) -> Iterator[TensorPiece]:
    """Yields the weight and the bias of a norm."""
    for leaf in ("weight", "bias"):
        yield same(f"{ours}.{leaf}", f"{theirs}.{leaf}")
