"""The operands of a kernel's backward pass, and the sums of their gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.kernels.reference import accumulation_dtype
from models.scores import Score, Tensors


class Operands:
    """q, k and v of a kernel's backward pass, and the sums of their gradients.

    A score makes q, k and v out of the tensors of the layer; `close` carries the sums back through
    that once, in place of once for every block.

    Args:
        into: wide sums of the gradients of (*query, *payload, *params).
    """

    def __init__(
        self,
        score: Score,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        into: Sequence[Tensor],
    ):
        self.leaves = [tensor.detach().requires_grad_() for tensor in (*query, *payload, *params)]
        queries = len(query)
        payloads = len(query) + len(payload)
        with torch.enable_grad():
            made = score.operands(
                self.leaves[:queries], self.leaves[queries:payloads], self.leaves[payloads:]
            )
        self.made = made
        self.all_sums = into
        sources = [self._leaf_index(operand) for operand in made]
        self.same = all(source is not None for source in sources)
        self.operands = tuple(operand.detach() for operand in made)
        if self.same:
            # The operands are the layer's tensors themselves: add straight into their sums.
            self.sums = [self.all_sums[source] for source in sources if source is not None]
        else:
            dtype = accumulation_dtype(made[0].dtype)
            self.sums = []
            for operand in self.operands:
                self.sums.append(
                    torch.zeros_like(operand, dtype=dtype, memory_format=torch.contiguous_format)
                )

    def _leaf_index(self, operand: Tensor) -> int | None:
        """Returns the number of the leaf that an operand is, None if it was computed."""
        for index, leaf in enumerate(self.leaves):
            if leaf is operand:
                return index
        return None

    def of(
        self, rows: tuple[slice, slice], keys: tuple[slice, slice]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Returns (q, k, v) of a block, and the sums of their gradients."""
        slices = rows, keys, keys
        operands = [operand[where] for operand, where in zip(self.operands, slices)]
        sums = [total[where] for total, where in zip(self.sums, slices)]
        return operands, sums

    def close(self) -> None:
        """Carries the sums back to the tensors that the operands were made of."""
        if self.same:
            return
        d_made = [total.to(operand.dtype) for total, operand in zip(self.sums, self.made)]
        gradients = torch.autograd.grad(self.made, self.leaves, d_made, allow_unused=True)
        add_gradients(self.all_sums, gradients)


def add_gradients(sums: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Adds each gradient to its sum; None adds nothing."""
    for accumulator, gradient in zip(sums, gradients, strict=True):
        if gradient is not None:
            accumulator += gradient
