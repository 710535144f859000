"""KV caches: what one attention holds of the earlier tokens of its rows while it decodes.

What is held is the payload of the primitive, whatever the mixer makes it: rotated keys and values,
latents, keys with their hashes. It was computed from addresses, so it is right wherever it lies.

A cache is one class, with a factory that Hydra builds from `cache=` (conf/cache/). To add one,
derive from both and leave everything that is not about storage alone.

Letters: B rows, T tokens at hand, S slots, H query heads, G key heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from models.cache.slots import SlotTable
from models.masks.algebra import Mask
from models.scores import Tensors
from models.span import Span


class KVCache(ABC):
    """The payload of the earlier tokens of each row, for one primitive.

    Attributes:
        per_head: `read` returns rows of one key head each: tensors [B G, S, 1, ...] and addresses
            [B G, S], the heads of a row side by side. For caches whose heads hold different tokens.
        wants_weights: `observe` is called after each attention.
    """

    per_head: ClassVar[bool] = False
    wants_weights: ClassVar[bool] = False

    @abstractmethod
    def append(self, payload: Tensors, span: Span) -> None:
        """Takes the tokens at hand after those that are held.

        Args:
            payload: tensors [B, T, ...].
            span: their addresses [B, T]; padding is not held.
        """

    @abstractmethod
    def read(self) -> tuple[Tensors, Span]:
        """Returns what is held: tensors [B, S, ...] and addresses [B, S].

        An empty slot is padding. Between two calls of `append` the addresses are the same object.
        """

    def observe(self, weights: Tensor, span: Span) -> None:  # noqa: B027
        """Receives the weights of the queries at hand over the slots that `read` returned.

        Args:
            weights: [B, H, T, S] after the softmax; 0 at slots that a query does not see.
            span: addresses of the queries [B, T].
        """

    @abstractmethod
    def select(self, rows: Tensor) -> None:
        """Keeps these rows, [N] int64, in this order; a row may come several times."""

    @abstractmethod
    def join(self, other: Any) -> None:
        """Adds the rows of another cache of this kind below its own."""

    def release(self) -> None:  # noqa: B027
        """Gives back what other caches may use; nothing is asked of it afterwards."""

    @abstractmethod
    def bytes(self) -> int:
        """Returns the bytes that are reserved, without addresses."""

    def fits(self, tokens: int) -> bool:
        """Tells whether every row can take so many more tokens; False only where room is bounded
        and used up."""
        return True

    def counters(self) -> Mapping[str, int]:
        """Returns numbers to report, such as the tokens that were evicted."""
        return {}

    @abstractmethod
    def export_state(self) -> tuple[Tensors, Span]:
        """Returns what `read` does, exactly as it is held, in rows of one token for all heads."""

    @abstractmethod
    def import_state(self, payload: Tensors, span: Span) -> None:
        """Takes over what `export_state` gave, in place of everything that is held."""


class KVCacheFactory(ABC):
    """Makes the cache of each attention; one for the whole model, built from `cache=`.

    Attributes:
        replicated: every rank holds all that the cache holds, and reads prompts whole. For caches
            that are small, and whose choices need the weights of all tokens.
        bounded: there may be no room for a token, and rows may have to wait.
    """

    replicated: ClassVar[bool] = False
    bounded: bool = False

    def prepare(self, model: nn.Module) -> None:  # noqa: B027
        """Is told the model whose caches it will make, before the first of them."""

    def announce(self, tokens: Tensor | None) -> None:  # noqa: B027
        """Is told the tokens [B, T] of the piece that comes next; None: nobody says them."""

    def admits(self, lengths: Sequence[int]) -> bool:
        """Tells whether there is room for more rows, of so many tokens and one more each."""
        return True

    @abstractmethod
    def create(self, place: str, mask: Mask, slots: SlotTable) -> KVCache:
        """Returns an empty cache.

        Args:
            place: name of the primitive in the model.
            mask: by which its queries read.
            slots: where the tokens of a row stand, shared with the layers that see the same tokens
                by the same mask. A cache that places tokens by itself leaves it alone.
        """

    def least_bytes(self, tokens: int, numbers: int, itemsize: int) -> int:
        """Returns the least bytes in which it holds tokens of a row, in one tensor of a payload.

        Args:
            tokens: that a mask may still show.
            numbers: of a token.
            itemsize: bytes of a number.
        """
        return tokens * numbers * itemsize

    def misfits(self, model: nn.Module) -> list[str]:
        """Returns one sentence for each reason why this cache does not fit the model."""
        return []
