"""GPT-2: learned positions, norms with a bias, and matrices that are stored transposed."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.adapter import Adapter, Architecture
from models.hub.description import DECODER, LEARNED, MIXER, TARGET, Description
from models.hub.keys import Keys
from models.hub.tensors import TensorPiece, same, split, transposed

FEEDFORWARD = "models.feedforward.FeedForward"
# Their other names of activations are read as well; these are written.
ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


class GPT2(Adapter):
    """Pre-norm decoder with multi-head attention, biases everywhere and a tied head.

    Source: Radford et al. 2019 (Language Models are Unsupervised Multitask Learners).
    """

    model_type = "gpt2"
    model_class = "GPT2LMHeadModel"
    base_prefix = "transformer."
    unused = (".attn.bias", ".attn.masked_bias")  # the causal mask, in older files
    dropouts = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
    without_effect = (
        "n_ctx",
        "reorder_and_upcast_attn",  # it changes where their attention rounds
        # summary_*: of a head that is not the language model's
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
    )

    def read(self, keys: Keys) -> Architecture:
        """See Adapter.read."""
        keys.demand("add_cross_attention", False, reason="a second stream of tokens has no place")
        keys.dropout(*self.dropouts)
        width = keys.size("n_embd", 768)
        heads = keys.size("n_head", 12)
        layers = keys.size("n_layer", 12)
        feedforward = {
            TARGET: FEEDFORWARD,
            "activation": keys.activation("activation_function", "gelu_new"),
        }
        mixers, pattern = self.mixers(keys, width // heads, layers)
        model = {
            TARGET: DECODER,
            "width": width,
            "layers": layers,
            "heads": heads,
            "kv_heads": heads,
            "ffn": keys.take("n_inner", None) or 4 * width,
            "vocabulary": keys.size("vocab_size", 50_257),
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "norm": "layer",
            "norm_eps": keys.real("layer_norm_epsilon", 1e-5),
            "mixers": mixers,
            "pattern": pattern,
            "feedforwards": {"dense": feedforward},
            "feedforward_pattern": ["dense"],
        }
        return Architecture(model, {TARGET: LEARNED, "max_length": keys.size("n_positions", 1024)})

    def mixers(
        self, keys: Keys, head_width: int, layers: int
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the mixers by label, and the label of every layer.

        With scale_attn_by_inverse_layer_idx every layer has a scale of its own.
        """
        scale = head_width**-0.5 if keys.flag("scale_attn_weights", True) else 1.0
        node: dict[str, Any] = {TARGET: MIXER, "bias": True, "out_bias": True}
        if keys.flag("scale_attn_by_inverse_layer_idx", False):
            mixers = {}
            for layer in range(layers):
                mixers[f"full_{layer}"] = {**node, "scale": scale / (layer + 1)}
            return mixers, list(mixers)
        if scale == 1.0:
            node["scale"] = scale
        return {"full": node}, ["full"]

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        sizes = model.sizes
        if model.position[TARGET] != LEARNED:
            raise ValueError(f"position._target_={model.position[TARGET]}: GPT-2 has learned ones")
        scales = [mixer.get("scale") for mixer in model.mixers]
        return {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "activation_function": ACTIVATION_NAMES[model.feedforwards[0]["activation"]],
            "add_cross_attention": False,
            "layer_norm_epsilon": model.stack.get("norm_eps"),
            "n_embd": sizes["width"],
            "n_head": sizes["heads"],
            "n_inner": sizes["ffn"],
            "n_layer": sizes["layers"],
            "n_positions": model.position["max_length"],
            **dict.fromkeys(self.dropouts, 0.0),
            "scale_attn_by_inverse_layer_idx": len(set(scales)) > 1,
            # In the first layer both rules of scales agree.
            "scale_attn_weights": scales[0] != 1.0,
            "tie_word_embeddings": model.stack.get("tie_embeddings", False),
            "vocab_size": sizes["vocabulary"],
        }

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See Adapter.ties."""
        return {"head.weight": "embed.weight"} if content.get("tie_word_embeddings", True) else {}

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """See Adapter.pieces."""
        yield same("embed.weight", "transformer.wte.weight")
        yield same("position.table.weight", "transformer.wpe.weight")
        for layer in range(content.get("n_layer", 12)):
            yield from self.layer(f"blocks.{layer}.", f"transformer.h.{layer}.")
        yield from _norm("norm", "transformer.ln_f")
        if not self.ties(content):
            yield same("head.weight", "lm_head.weight")

    def layer(self, ours: str, theirs: str) -> Iterator[TensorPiece]:
        """Yields the pieces of one layer, given what its names begin with."""
        yield from _norm(f"{ours}mixer_norm", f"{theirs}ln_1")
        projections = [f"{ours}mixer.{name}" for name in ("q", "k", "v")]
        weights = [f"{name}.weight" for name in projections]
        biases = [f"{name}.bias" for name in projections]
        yield split(weights, f"{theirs}attn.c_attn.weight", 1, transpose=True)
        yield split(biases, f"{theirs}attn.c_attn.bias", 0)
        yield from _linear(f"{ours}mixer.out", f"{theirs}attn.c_proj")
        yield from _norm(f"{ours}feedforward_norm", f"{theirs}ln_2")
        yield from _linear(f"{ours}feedforward.up", f"{theirs}mlp.c_fc")
        yield from _linear(f"{ours}feedforward.down", f"{theirs}mlp.c_proj")


def _norm(ours: str, theirs: str) -> Iterator[TensorPiece]:
    for leaf in ("weight", "bias"):
        yield same(f"{ours}.{leaf}", f"{theirs}.{leaf}")


def _linear(ours: str, theirs: str) -> Iterator[TensorPiece]:
    """Yields a linear layer; theirs is a Conv1D, whose weight is [in, out]."""
    yield transposed(f"{ours}.weight", f"{theirs}.weight")
    yield same(f"{ours}.bias", f"{theirs}.bias")
