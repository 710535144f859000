"""BERT: an encoder with learned positions, norms behind every layer, and a masked-LM head."""

from collections.abc import Iterator, Mapping
from typing import Any

from models.hub.adapter import Adapter, Architecture
from models.hub.description import ENCODER, LEARNED, MIXER, TARGET, Description
from models.hub.gpt2 import FEEDFORWARD
from models.hub.keys import Keys
from models.hub.llama import ACTIVATION_NAMES
from models.hub.tensors import TensorPiece, same

BARE = "BertModel"  # without a head, with a map of first tokens
MASKED = "BertForMaskedLM"
LAYER = {
    "mixer.q": "attention.self.query",
    "mixer.k": "attention.self.key",
    "mixer.v": "attention.self.value",
    "mixer.out": "attention.output.dense",
    "mixer_norm": "attention.output.LayerNorm",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}


class Bert(Adapter):
    """Bidirectional attention with biases; of the model without its head, the tied embedding is the
    head here.

    Source: Devlin et al. 2018 (arXiv:1810.04805).
    """

    model_type = "bert"
    model_class = MASKED
    base_prefix = ""  # `pieces` says with which prefix the names of each class begin
    # Tensors beside those of the two classes: positions as numbers, the loss of the next sentence.
    unused = ("embeddings.position_ids", "cls.seq_relationship.", "bert.pooler.")
    dropouts = ("attention_probs_dropout_prob", "hidden_dropout_prob", "classifier_dropout")
    without_effect = ("gradient_checkpointing",)

    def read(self, keys: Keys) -> Architecture:
        """See Adapter.read."""
        kind = _class_of(keys.content)
        keys.demand("is_decoder", False, reason="a BERT that sees earlier tokens alone is no BERT")
        keys.demand("add_cross_attention", False, reason="a second stream of tokens has no place")
        keys.demand(
            "position_embedding_type", "absolute", reason="relative positions are not offered"
        )
        keys.dropout(*self.dropouts)
        activation = keys.activation("hidden_act", "gelu")
        heads = keys.size("num_attention_heads", 12)
        mixer = {TARGET: MIXER, "bias": True, "out_bias": True, "causal": False}
        model = {
            TARGET: ENCODER,
            "width": keys.size("hidden_size", 768),
            "layers": keys.size("num_hidden_layers", 12),
            "heads": heads,
            "kv_heads": heads,
            "ffn": keys.size("intermediate_size", 3072),
            "vocabulary": keys.size("vocab_size", 30_522),
            "tie_embeddings": keys.flag("tie_word_embeddings", True),
            "norm_eps": keys.real("layer_norm_eps", 1e-12),
            "segments": keys.size("type_vocab_size", 2),
            "head_transform": activation if kind == MASKED else None,
            "pooler": kind == BARE,
            "mixers": {"bidirectional": mixer},
            "pattern": ["bidirectional"],
            "feedforwards": {"dense": {TARGET: FEEDFORWARD, "activation": activation}},
            "feedforward_pattern": ["dense"],
        }
        length = keys.size("max_position_embeddings", 512)
        return Architecture(model, {TARGET: LEARNED, "max_length": length})

    def write(self, model: Description) -> dict[str, Any]:
        """See Adapter.write."""
        sizes = model.sizes
        if model.stack[TARGET] != ENCODER:
            raise ValueError(f"model._target_={model.stack[TARGET]}: BERT is an encoder")
        if model.position[TARGET] != LEARNED:
            raise ValueError(f"position._target_={model.position[TARGET]}: BERT has learned ones")
        return {
            "architectures": [BARE if model.stack["pooler"] else MASKED],
            "model_type": self.model_type,
            "hidden_size": sizes["width"],
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "intermediate_size": sizes["ffn"],
            "vocab_size": sizes["vocabulary"],
            "tie_word_embeddings": model.stack["tie_embeddings"],
            "layer_norm_eps": model.stack["norm_eps"],
            "type_vocab_size": model.stack["segments"],
            "hidden_act": ACTIVATION_NAMES[model.feedforwards[0]["activation"]],
            "max_position_embeddings": model.position["max_length"],
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
        }

    def ties(self, content: Mapping[str, Any]) -> dict[str, str]:
        """See Adapter.ties."""
        return {"head.weight": "embed.weight"} if content.get("tie_word_embeddings", True) else {}

    def pieces(self, content: Mapping[str, Any]) -> Iterator[TensorPiece]:
        """See Adapter.pieces."""
        kind = _class_of(content)
        base = "" if kind == BARE else "bert."
        yield same("embed.weight", f"{base}embeddings.word_embeddings.weight")
        yield same("position.table.weight", f"{base}embeddings.position_embeddings.weight")
        yield same("segments.weight", f"{base}embeddings.token_type_embeddings.weight")
        yield from _affine("embed_norm", f"{base}embeddings.LayerNorm")
        for layer in range(content.get("num_hidden_layers", 12)):
            for mine, theirs in LAYER.items():
                yield from _affine(
                    f"blocks.{layer}.{mine}", f"{base}encoder.layer.{layer}.{theirs}"
                )
        if kind == BARE:
            yield from _affine("pooler", "pooler.dense")
            return
        head = "cls.predictions."
        yield from _affine("transform.dense", f"{head}transform.dense")
        yield from _affine("transform.norm", f"{head}transform.LayerNorm")
        yield same("head.bias", f"{head}bias")
        if not self.ties(content):
            yield same("head.weight", f"{head}decoder.weight")


def _class_of(content: Mapping[str, Any]) -> str:
    """Returns which class of transformers a config.json is of.

    Raises:
        ValueError: it has a head for something else.
    """
    named = content.get("architectures") or [MASKED]
    if named[0] not in (BARE, MASKED):
        raise ValueError(
            f"config.json has architectures={named}: the head of {named[0]} is not offered; known:"
            f" {BARE}, {MASKED}"
        )
    return named[0]


def _affine(ours: str, theirs: str) -> Iterator[TensorPiece]:
    """Yields the weight and the bias of a map or a norm."""
    for leaf in ("weight", "bias"):
        yield same(f"{ours}.{leaf}", f"{theirs}.{leaf}")
