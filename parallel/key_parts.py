"""Cuts the keys of a rank into parts, so that one part travels while another is computed.

An exchange of whole blocks leaves the first block of a pass exposed, and the gradients of the last.
Of n parts only one n-th of either is. Parts cost further calls of a kernel, so a part has no fewer
tokens than a call is worth. The number follows from shapes alone: every rank finds the same.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from models.plans import planned
from models.scores import Tensors
from models.span import Span

# Fewest tokens of a part, by device: where a call of a kernel takes some times its launch.
PART_TOKENS = {"cpu": 512, "meta": 512, "cuda": 4096}
# Least size of all tensors of a part, where each message costs.
PART_BYTES = {"cpu": 1 << 20, "meta": 1 << 20}
# Further parts hide little more.
MOST_PARTS = 4


class KeyPart(NamedTuple):
    """Tokens [start, stop) of a rank's keys; the same ones on every rank."""

    start: int
    stop: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start

    def of(self, payload: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[B, S, ...] -> [B, stop - start, ...], views."""
        return tuple(tensor[:, self.start : self.stop] for tensor in payload)

    def of_span(self, whole: Span) -> Span:
        """Returns the addresses of these keys."""
        return part_span(whole, self.start, self.stop)

    def add(self, sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Adds the gradients of these keys to those of all, [B, S, ...]."""
        for accumulator, gradient in zip(self.of(sums), gradients, strict=True):
            accumulator += gradient


@planned
def part_span(whole: Span, start: int, stop: int) -> Span:
    """Returns the addresses of tokens [start, stop); one object for all layers of a step."""
    if (start, stop) == (0, whole.shape[1]):
        return whole

    def build() -> Span:
        def cut(addresses: Tensor) -> Tensor:
            return addresses[:, start:stop]

        part = whole.map(cut)
        part.copy = None if whole.copy is None else whole.copy.map(cut)
        return part

    return whole.cache.get(("part", start, stop), build)


def part_count(tokens: int, device_type: str, most: int = MOST_PARTS) -> int:
    """Returns the number of parts that so many keys travel in."""
    least = PART_TOKENS.get(device_type, PART_TOKENS["cuda"])
    return max(1, min(most, tokens // least))


def key_parts(payload: Tensors) -> list[KeyPart]:
    """Returns the parts in which these keys travel, in their order."""
    tokens = payload[0].shape[1]
    device_type = payload[0].device.type
    size = sum(tensor.numel() * tensor.element_size() for tensor in payload)
    most = min(MOST_PARTS, size // PART_BYTES.get(device_type, 1))
    return even_parts(tokens, part_count(tokens, device_type, most))


def even_parts(tokens: int, count: int) -> list[KeyPart]:
    """Returns as many parts of about equally many tokens."""
    edges = [tokens * number // count for number in range(count + 1)]
    return [KeyPart(start, stop) for start, stop in zip(edges[:-1], edges[1:])]


def split_own(parts: Sequence[KeyPart]) -> tuple[KeyPart, KeyPart]:
    """Returns the share of a rank's own keys that is computed first in backward, and the rest.

    The first is to last as long as the first part travels; under a causal mask the later half of
    the keys has a quarter of the pairs. Empty where everything travels in one part.
    """
    tokens = parts[-1].stop
    middle = parts[len(parts) // 2].start if len(parts) > 1 else tokens
    return KeyPart(middle, tokens), KeyPart(0, middle)
