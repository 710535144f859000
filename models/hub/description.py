"""The description of a model, layer by layer, in the words of our config."""

from dataclasses import dataclass
from typing import Any

TARGET = "_target_"
DECODER = "models.architectures.decoder.Decoder"
LATENT = "models.attention.latent.LatentAttention"
MIXTURE = "models.moe.topk.TopKMixture"
ENCODER = "models.architectures.encoder.MaskedEncoder"
LEARNED = "models.positions.learned.Learned"
MIXER = "models.hub.attention.HubAttention"


@dataclass
class Description:
    """A model: sizes, settings of the stack, and the node of every layer.

    Attributes:
        sizes: by the names that a config offers to constructors.
        stack: settings of the decoder.
        mixers, feedforwards: one node for each layer.
        position: of all layers that have none of their own.
    """

    sizes: dict[str, Any]
    stack: dict[str, Any]
    mixers: list[dict[str, Any]]
    feedforwards: list[dict[str, Any]]
    position: dict[str, Any]
