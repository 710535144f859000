"""The source that a row keeps while it is decoded, for models of two streams.

Letters: B rows, S tokens of the source.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.carried_state import StatefulModule
from models.memory.base import Memory
from models.span import Span


class SourceMemory(StatefulModule):
    """Hands on what was computed of a source; while a row is decoded, it is computed once.

    The first piece of a row brings it, and leaves it in `Span.past` under this module's name. Later
    pieces bring nothing and find it there, in the rows that the state still holds.
    """

    def forward(
        self, span: Span, memory: Sequence[Tensor] | None, source_span: Span | None
    ) -> tuple[tuple[Tensor, ...], Span]:
        """Returns (memory, addresses of its tokens).

        Args:
            span: of the tokens at hand.
            memory: tensors [B, S, ...] of the source; None: those that an earlier piece left.
            source_span: addresses of the source; None with `memory`.
        """
        past = span.past
        if memory is not None and source_span is not None:
            if past is not None:
                for number, tensor in enumerate((*source_span.addresses(), *memory)):
                    past.store(f"{self.place}.{number}", tensor)
            return tuple(memory), source_span
        found: list[Tensor] = []
        while (tensor := past.state(f"{self.place}.{len(found)}")) is not None:
            found.append(tensor)
        if not found:
            raise ValueError(
                f"{self.place}: no earlier piece of these rows has brought their source; give it"
                " with the first"
            )
        pos, doc, role, *rest = found
        return tuple(rest), Span(pos, doc, role)


def refuse_memory(model: nn.Module, memory: Memory | None) -> None:
    """Raises ValueError for a memory that would carry something from row to row."""
    if memory is not None and type(memory) is not Memory:
        raise ValueError(
            f"{type(model).__name__} takes no memory: a row is read with its source; use"
            " memory=none"
        )


def needs_source(model: nn.Module) -> ValueError:
    """Returns the error of a model that was called without a source."""
    return ValueError(
        f"{type(model).__name__} reads a source beside each row, and was called without one; give"
        " MicroBatch(tokens, span, targets, source)"
    )
