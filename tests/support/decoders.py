"""Small whole models of every kind that decodes, in float64."""

from collections.abc import Callable

import torch
from torch import nn

from models.architectures.decoder import Decoder
from models.architectures.key_value import KeyValue
from models.architectures.lstm import Lstm
from models.architectures.ntm import NeuralTuringMachine
from models.attention.full import Attention
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.memory.base import Memory
from models.memory.compressive import Compressive
from models.memory.lookup import Memorizing
from models.memory.segments import SegmentMemory
from models.memory.tokens import MemoryTokens
from models.moe.switch import Switch
from models.moe.topk import TopKMixture
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.positions.sinusoidal import Sinusoidal
from models.recurrent.rwkv7 import Rwkv7
from models.recurrent.rwkv_layers import ChannelMix
from tests.variants import HEADS, VARIANTS, WIDTH, Taught

WORDS = 13


def stack(
    mixers: list[nn.Module], memory: Memory | None = None, feedforward=None, position=None
) -> nn.Module:
    """A decoder of these mixers."""
    if memory is not None:
        sizes = {"layers": len(mixers), "context_length": 51}
        mixers = [memory.around(mixer, layer=layer, **sizes) for layer, mixer in enumerate(mixers)]
    feedforward = feedforward or (lambda layer: SwiGLU(WIDTH, 20))
    layers = [feedforward(layer) for layer in range(len(mixers))]
    return Decoder(WORDS, WIDTH, mixers, layers, position=position, memory=memory)


def attention(position=None) -> nn.Module:
    return Attention(WIDTH, HEADS, 3, position or Rope())


def mixed(*names: str) -> list[nn.Module]:
    built = [VARIANTS[name]() for name in names]
    # The wrapper of compressed attention adds a loss, which only a pass with gradients makes.
    return [mixer.inner if isinstance(mixer, Taught) else mixer for mixer in built]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "full": lambda: stack([attention(), attention()]),
    "sinusoidal": lambda: stack(mixed("no_position"), position=Sinusoidal()),
    "hybrid": lambda: stack(mixed("gated_delta", "sliding", "mamba2", "compressed_dense")),
    "hybrid_convolutions": lambda: stack(mixed("hyena", "latent", "short_conv", "lsh")),
    "shared_values": lambda: stack(
        [Rwkv7(WIDTH, HEADS, layer, 2, rank=5) for layer in range(2)],
        feedforward=lambda layer: ChannelMix(WIDTH, 20, layer, 2),
    ),
    "experts_topk": lambda: stack(
        [attention(), attention()],
        feedforward=lambda layer: TopKMixture(WIDTH, 20, layer, 2, experts=4, shared=1),
    ),
    "experts_switch": lambda: stack(
        [attention()],
        feedforward=lambda layer: Switch(WIDTH, 20, experts=4, eval_capacity_factor=None),
    ),
    "memory_segments": lambda: stack(
        [attention(Relative()), attention(Relative())], SegmentMemory(3, segment=4)
    ),
    "memory_segments_hybrid": lambda: stack(
        [attention(), *mixed("mamba2")], SegmentMemory(5, segment=3)
    ),
    "memory_segments_row": lambda: stack([attention()], SegmentMemory(5)),
    "memory_tokens": lambda: stack([attention(), attention()], MemoryTokens(2, segment=4)),
    "memory_tokens_document": lambda: stack(mixed("full", "mamba2"), MemoryTokens(3)),
    "memory_compressive": lambda: stack([attention()], Compressive(segment=4)),
    "memory_compressive_delta": lambda: stack([attention()], Compressive(rule="delta", segment=3)),
    "memory_compressive_row": lambda: stack([attention()], Compressive()),
    "memory_lookup": lambda: stack(
        [attention(), attention()], Memorizing(7, segment=4, count=3, layers=[1])
    ),
    "lstm": lambda: Lstm(WORDS, 10, 2),
    "ntm": lambda: NeuralTuringMachine(WORDS, 10, 2, slots=6, slot_width=4),
    "ntm_lstm": lambda: NeuralTuringMachine(WORDS, 10, 1, slots=6, slot_width=4, controller="lstm"),
    "key_value": lambda: KeyValue(WORDS, WIDTH),
}


def built(name: str) -> nn.Module:
    """The model, its parameters spread out so that nothing is equal by chance."""
    model = initialise(MODELS[name](), seed=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    name_stateful_modules(model)
    return model
