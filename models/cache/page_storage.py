"""Tensors of a paged cache: one per tensor of the payload, all pages of the pool in it.

Letters: P pages, N tokens of a page, n tokens of a call.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class PageStorage:
    """Keeps the payload of one layer in pages; allocated at the first write.

    Args:
        pages, page_tokens: as in the PagePool whose books say what lies where.
    """

    def __init__(self, pages: int, page_tokens: int):
        self.pages = pages
        self.page_tokens = page_tokens
        self.tensors: tuple[Tensor, ...] = ()

    def write(self, slots: Sequence[int], payload: Sequence[Tensor]) -> None:
        """Stores tokens [n, ...] at their places."""
        if not self.tensors:
            self.tensors = tuple(self._allocate(tensor) for tensor in payload)
        index = torch.tensor(slots, dtype=torch.long, device=payload[0].device)
        for stored, tensor in zip(self.tensors, payload, strict=True):
            stored.flatten(0, 1)[index] = tensor

    def read(self, slots: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns the tokens at these places, [n, ...] for each tensor of the payload."""
        index = torch.tensor(slots, dtype=torch.long, device=self.tensors[0].device)
        return tuple(stored.flatten(0, 1)[index] for stored in self.tensors)

    def grow(self, pages: int) -> None:
        """Adds pages behind the others."""
        self.pages += pages
        grown = []
        for stored in self.tensors:
            grown.append(torch.cat([stored, stored.new_zeros(pages, *stored.shape[1:])]))
        self.tensors = tuple(grown)

    def gather(self, pages: Tensor) -> tuple[Tensor, ...]:
        """Returns whole pages [B, n] as tokens, [B, n N, ...]."""
        return tuple(stored[pages].flatten(1, 2) for stored in self.tensors)

    def page_bytes(self) -> int:
        """Returns the bytes of a page."""
        return self.bytes() // self.pages

    def copy(self, source: int, target: int) -> None:
        """Copies a page onto another."""
        for stored in self.tensors:
            stored[target] = stored[source]

    def swap_out(self, pages: Sequence[int]) -> tuple[Tensor, ...]:
        """Returns copies of pages in host memory."""
        index = torch.tensor(pages, dtype=torch.long)
        copies = []
        for stored in self.tensors:
            copies.append(stored[index.to(stored.device)].cpu())
        return tuple(copies)

    def swap_in(self, pages: Sequence[int], copies: Sequence[Tensor]) -> None:
        """Writes pages that `swap_out` returned, to other numbers if need be."""
        index = torch.tensor(pages, dtype=torch.long)
        for stored, tensor in zip(self.tensors, copies, strict=True):
            stored[index.to(stored.device)] = tensor.to(stored.device)

    def bytes(self) -> int:
        """Returns the bytes allocated, free pages among them."""
        return sum(stored.numel() * stored.element_size() for stored in self.tensors)

    def _allocate(self, tensor: Tensor) -> Tensor:
        # Zeros, because a page is read whole by kernels that mask its unused end: memory that was
        # never written may hold NaN.
        return tensor.new_zeros(self.pages, self.page_tokens, *tensor.shape[1:])
