"""Llama 1 to 3.1, and the ground on which the adapters of similar decoders stand."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.adapter import SWIGLU, Adapter, Architecture
from models.hub.description import DECODER, MIXER, TARGET, Description
from models.hub.keys import Keys
from models.hub.rope import position_of, rope_entry, rope_parameters
from models.hub.tensors import TensorPiece, same

PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"}
FULL = "full_attention"
SLIDING = "sliding_attention"
LABELS = {FULL: "full", SLIDING: "sliding"}
ACTIVATION_NAMES = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "relu": "relu",
}
MATRICES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def windows(model: Description) -> tuple[list[str], int | None]:
    """Returns layer_types of a model, and the window of its layers that have one."""
    found = [mixer.get("window") for mixer in model.mixers]
    given = [window for window in found if window is not None]
    kinds = [FULL if window is None else SLIDING for window in found]
    return kinds, given[0] if given else None


class Llama(Adapter):
    """Pre-norm decoder with grouped-query attention, rotary positions and SwiGLU.

    Source: Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Grattafiori et al. 2024
    (arXiv:2407.21783).
    """

    model_type = "llama"
    model_class = "LlamaForCausalLM"
    theta = 10_000.0
    tied = False  # here and below: where config.json does not say
    norm_eps = 1e-6
    head_width: int | None = None
    activation_key = "hidden_act"
    default_activation = "silu"

    def read(self, keys: Keys) -> Architecture:
        """See Adapter.read."""
        keys.demand(
            "pretraining_tp", 1, reason="matrices cut for tensor parallelism are not offered"
        )
        keys.dropout(*self.dropouts)
        model = {
            TARGET: DECODER,
            "width": keys.size("hidden_size"),
            "layers": keys.size("num_hidden_layers"),
            "heads": keys.size("num_attention_heads"),
            "vocabulary": keys.size("vocab_size"),
            "tie_embeddings": keys.flag("tie_word_embeddings", self.tied),
            "norm_eps": keys.real("rms_norm_eps", self.norm_eps),
            **self.stack(keys),
        }
        kv_heads = keys.take("num_key_value_heads", None)
        model["kv_heads"] = model["heads"] if kv_heads is None else kv_heads
        mixers, model["pattern"] = self.mixers(keys, model)
        model["mixers"] = {label: {TARGET: MIXER, **settings} for label, settings in mixers.items()}
        feedforwards, model["feedforward_pattern"] = self.feedforwards(keys, model)
        model["feedforwards"] = feedforwards
        return Architecture(model, self.position(keys))

    def stack(self, keys: Keys) -> dict[str, Any]:
        """Returns further settings of the decoder."""
        return {}

    def position(self, keys: Keys) -> dict[str, Any]:
        """Returns the node of the position."""
        return position_of(rope_entry(keys), keys, self.theta)

    def mixers(
        self, keys: Keys, model: Mapping[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the settings of the mixers by label, and the label of every layer."""
        heads = self.heads(keys, model)
        window = self.window(keys)
        kinds = self.layer_types(keys, model["layers"], window)
        labels = [LABELS[kind] for kind in kinds]
        mixers = {}
        if "full" in labels:
            mixers["full"] = heads
        if "sliding" in labels:
            mixers["sliding"] = {**heads, "window": window}
        return mixers, labels if len(mixers) > 1 else labels[:1]

    def window(self, keys: Keys) -> int | None:
        """Returns the tokens that layers with a sliding window see; None: no layer has one."""
        return None

    def layer_types(self, keys: Keys, layers: int, window: int | None) -> list[str]:
        """Returns the kind of attention of every layer, by the words of transformers."""
        return [FULL if window is None else SLIDING] * layers

    def heads(self, keys: Keys, model: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the settings of attention that all layers share."""
        settings: dict[str, Any] = {}
        head_width = keys.take("head_dim", self.head_width)
        if head_width is not None and head_width * model["heads"] != model["width"]:
            settings["head_width"] = head_width
        bias, out_bias = self.biases(keys)
        if bias:
            settings["bias"] = True
        if out_bias:
            settings["out_bias"] = True
        return settings

    def biases(self, keys: Keys) -> tuple[bool, bool]:
        """Returns whether queries, keys and values have a bias, and whether the output has one."""
        bias = keys.flag("attention_bias", False)
        return bias, bias

    def feedforwards(
        self, keys: Keys, model: dict[str, Any]
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Returns the nodes of the feed-forward layers by label, and the label of every layer."""
        model["ffn"] = keys.size("intermediate_size")
        node: dict[str, Any] = {TARGET: SWIGLU}
        activation = keys.activation(self.activation_key, self.default_activation)
        if activation != "silu":
            node["activation"] = activation
        if keys.flag("mlp_bias", False):
            node["bias"] = True
        return {"dense": node}, ["dense"]

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        sizes = model.sizes
        mixer = model.mixers[0]
        feedforward = model.feedforwards[0]
        content = {
            "architectures": [self.model_class],
            "model_type": self.model_type,
            "hidden_size": sizes["width"],
            "intermediate_size": sizes.get("ffn"),
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "num_key_value_heads": mixer.get("kv_heads", sizes.get("kv_heads")),
            "head_dim": mixer.get("head_width", sizes["width"] // sizes["heads"]),
            self.activation_key: ACTIVATION_NAMES.get(str(feedforward.get("activation")), "silu"),
            "max_position_embeddings": sizes["context_length"],
            "rms_norm_eps": model.stack.get("norm_eps"),
            "rope_parameters": rope_parameters(model.position),
            "tie_word_embeddings": model.stack.get("tie_embeddings", False),
            "vocab_size": sizes["vocabulary"],
            "attention_dropout": 0.0,
        }
        original = content["rope_parameters"].get("original_max_position_embeddings", 0)
        if content["rope_parameters"]["rope_type"] == "dynamic":
            content["max_position_embeddings"] = model.position["original_length"]
        elif original:
            content["max_position_embeddings"] = max(original, sizes["context_length"])
        return {**content, **self.write_more(model)}

    def write_more(self, model: Description) -> dict[str, Any]:
        """Returns the keys in which this kind differs from the others like it."""
        return {
            "attention_bias": model.mixers[0].get("bias", False),
            "mlp_bias": model.feedforwards[0].get("bias", False),
            "pretraining_tp": 1,
        }

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See Adapter.ties."""
        tied = content.get("tie_word_embeddings", self.tied)
        return {"head.weight": "embed.weight"} if tied else {}

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """See Adapter.pieces."""
        yield same("embed.weight", "model.embed_tokens.weight")
        for layer in range(content["num_hidden_layers"]):
            yield from self.layer(content, layer, f"blocks.{layer}.", f"model.layers.{layer}.")
        yield same("norm.weight", "model.norm.weight")
        if not self.ties(content):
            yield same("head.weight", "lm_head.weight")

    def layer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """Yields the pieces of one layer, given what its names begin with."""
        yield from self.norms(ours, theirs)
        yield from self.mixer(content, layer, f"{ours}mixer.", f"{theirs}self_attn.")
        yield from self.feedforward(content, layer, f"{ours}feedforward.", f"{theirs}mlp.")

    def norms(self, ours: str, theirs: str) -> Iterator[TensorPiece]:
        """Yields the norms of a layer."""
        yield same(f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight")
        yield same(f"{ours}feedforward_norm.weight", f"{theirs}post_attention_layernorm.weight")

    def mixer(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """Yields the projections of attention."""
        bias, out_bias = self.biases(Keys(content))
        for mine, name in PROJECTIONS.items():
            yield same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
            if out_bias if mine == "out" else bias:
                yield same(f"{ours}{mine}.bias", f"{theirs}{name}.bias")

    def feedforward(
        self, content: Mapping[str, Any], layer: int, ours: str, theirs: str
    ) -> Iterator[TensorPiece]:
        """Yields the matrices of the feed-forward layer."""
        for mine, name in MATRICES.items():
            yield same(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
            if content.get("mlp_bias", False):
                yield same(f"{ours}{mine}.bias", f"{theirs}{name}.bias")
