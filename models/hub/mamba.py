"""Mamba-2: layers without a feed-forward part, whose time steps, keys and queries share one
projection and one short convolution."""

from collections.abc import Iterator, Mapping
from math import isinf
from typing import Any

from models.hub.adapter import NO_FEED_FORWARD, NO_POSITION, Adapter, Architecture
from models.hub.description import DECODER, TARGET, Description
from models.hub.keys import Keys
from models.hub.tensors import TensorPiece, conv_taps, same

MAMBA2 = "models.recurrent.mamba2.Mamba2"
VECTORS = {"pace": "A_log", "delay": "dt_bias", "skip": "D", "norm.weight": "norm.weight"}


class Mamba2Hub(Adapter):
    """A state space model of heads with one decay each, in groups that share keys and queries.

    Source: Dao & Gu 2024 (arXiv:2405.21060).
    """

    model_type = "mamba2"
    model_class = "Mamba2ForCausalLM"
    base_prefix = "backbone."
    # How initial weights are drawn, how many tokens are computed at a time; the last is noted.
    without_effect = (
        "chunk_size",
        "rescale_prenorm_residual",
        "time_step_floor",
        "time_step_max",
        "time_step_min",
        "time_step_rank",
        "residual_in_fp32",
    )

    def read(self, keys: Keys) -> Architecture:
        """See Adapter.read."""
        keys.demand("hidden_act", "silu", "swish", reason="the layer has silu on both sides")
        if keys.flag("residual_in_fp32", True):
            keys.notes.append(
                "residual_in_fp32=true: with precision=bfloat16 the sum of layers is bfloat16 here"
            )
        eps = keys.real("layer_norm_epsilon", 1e-5)
        width = keys.size("hidden_size", 4096)
        heads = keys.size("num_heads", 128)
        head_width = keys.size("head_dim", 64)
        expand = keys.size("expand", 2)
        if heads * head_width != expand * width:
            raise ValueError(
                f"config.json has num_heads={heads}, head_dim={head_width}, expand={expand} and"
                f" hidden_size={width}: {heads} x {head_width} is not {expand} x {width}"
            )
        least, most = _step_limits(keys)
        mixer = {
            TARGET: MAMBA2,
            "state": keys.size("state_size", 128),
            "expand": expand,
            "conv_kernel": keys.size("conv_kernel", 4),
            "groups": keys.size("n_groups", 8),
            "bias": keys.flag("use_bias", False),
            "conv_bias": keys.flag("use_conv_bias", True),
            "norm_eps": eps,
            "min_step": least,
            "max_step": most,
        }
        model = {
            TARGET: DECODER,
            "width": width,
            "layers": keys.size("num_hidden_layers", 64),
            "heads": heads,
            "vocabulary": keys.size("vocab_size", 32768),
            "tie_embeddings": keys.flag("tie_word_embeddings", False),
            "norm_eps": eps,
            "mixers": {"mamba2": mixer},
            "pattern": ["mamba2"],
            "feedforwards": {"none": {TARGET: NO_FEED_FORWARD}},
            "feedforward_pattern": ["none"],
        }
        return Architecture(model, {TARGET: NO_POSITION})

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        sizes = model.sizes
        mixer = model.mixers[0]
        most = mixer["max_step"]
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "hidden_size": sizes["width"],
            "num_heads": sizes["heads"],
            "head_dim": mixer["expand"] * sizes["width"] // sizes["heads"],
            "expand": mixer["expand"],
            "state_size": mixer["state"],
            "conv_kernel": mixer["conv_kernel"],
            "n_groups": mixer["groups"],
            "use_bias": mixer["bias"],
            "use_conv_bias": mixer["conv_bias"],
            "layer_norm_epsilon": mixer["norm_eps"],
            # transformers writes an infinite number in this form, which JSON has not
            "time_step_limit": [
                mixer["min_step"],
                {"__float__": "Infinity"} if most is None else most,
            ],
            "num_hidden_layers": sizes["layers"],
            "vocab_size": sizes["vocabulary"],
            "tie_word_embeddings": model.stack.get("tie_embeddings", False),
            "hidden_act": "silu",
        }

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See Adapter.ties."""
        tied = content.get("tie_word_embeddings", False)
        return {"head.weight": "embed.weight"} if tied else {}

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """See Adapter.pieces."""
        bias = content.get("use_bias", False)
        yield same("embed.weight", "backbone.embeddings.weight")
        for layer in range(content.get("num_hidden_layers", 64)):
            ours = f"blocks.{layer}."
            theirs = f"backbone.layers.{layer}."
            yield same(f"{ours}mixer_norm.weight", f"{theirs}norm.weight")
            ours += "mixer."
            theirs += "mixer."
            yield conv_taps(f"{ours}taps.weight", f"{theirs}conv1d.weight")
            if content.get("use_conv_bias", True):
                yield same(f"{ours}taps.bias", f"{theirs}conv1d.bias")
            for mine, name in VECTORS.items():
                yield same(ours + mine, theirs + name)
            for mine, name in {"inner": "in_proj", "out": "out_proj"}.items():
                yield same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
                if bias:
                    yield same(f"{ours}{mine}.bias", f"{theirs}{name}.bias")
        yield same("norm.weight", "backbone.norm_f.weight")
        if not self.ties(content):
            yield same("head.weight", "lm_head.weight")


def _step_limits(keys: Keys) -> tuple[float, float | None]:
    """Returns the smallest and the largest time step; None: no largest."""
    given = keys.take("time_step_limit", None) or (0.0, None)
    if len(given) != 2:
        raise ValueError(f"config.json has time_step_limit={given!r}; two numbers are needed")
    least, most = given
    if isinstance(most, Mapping):
        most = float(most.get("__float__", "nan"))
    if most is not None and isinf(most):
        most = None
    return float(least), None if most is None else float(most)
