"""Memories, `memory=` in the config: state that a decoder carries from row to row of a lane."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from models.span import Span

LayerStack = Callable[[Tensor, Span], Tensor]  # x [B, T, width] through all layers of a decoder


class Memory:
    """No memory; the parent of all. Built from the config, one for the whole model; owns no
    parameter itself.

    Args:
        length: tokens carried: none here.
    """

    def __init__(self, length: int = 0):
        if length:
            raise ValueError(
                f"memory.length={length}, but memory=none carries nothing; use memory.length=0, or"
                " another memory"
            )

    def around(self, mixer: nn.Module, **sizes: Any) -> nn.Module:
        """A layer's mixer as it is with this memory.

        Args:
            mixer: as built for a decoder without memory.
            sizes: on offer, as to a mixer: width, layer, layers, heads, kv_heads, seed, ...

        Raises:
            ValueError: this memory has no exact form around such a mixer; says what to use.
        """
        return mixer

    def validate_mixers(self, mixers: Sequence[nn.Module]) -> None:
        """Raises ValueError where all layers, as `around` left them, go without what this memory
        promises."""

    def stack(self, width: int) -> nn.Module | None:
        """A module (x [B, T, width], span, through all layers) -> [B, T, width] around all layers;
        None: there is none."""
        return None
