"""The state that lanes of the batch carry from step to step, on this rank.

Lane i: row i of a step continues where row i of the step before ended. A CarriedState belongs to
the rows of one micro-batch. A checkpoint holds the state as it would be on one device.

Letters: R rows of a step, over all ranks.
"""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from models.carried_state import REPLICATED, SHARDED, CarriedState
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.heap import trim_heap
from parallel.mesh import Mesh
from parallel.row_pieces import piece_state
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder

State = dict[str, dict[str, Tensor]]  # {kind: {name: [R, ...]}}
# kept, addresses and states of a models.carried_state.CarriedState
Held = tuple[dict[str, tuple[int, Tensor]], dict[int, Span], dict[str, tuple[str, Tensor]]]


class Lanes:
    """The carried states of this rank's micro-batches.

    Args:
        mesh: the ranks.
        share: cuts a step's rows into micro-batches.
        rows: R.
    """

    def __init__(self, mesh: Mesh, share: BatchSharder, rows: int):
        self.mesh = mesh
        self.share = share
        self.rows = rows
        self.pasts: list[CarriedState] = []
        communicator = Communicator(mesh.context.group) if mesh.context.size > 1 else None
        for _ in range(share.pieces):
            if communicator is None:
                self.pasts.append(CarriedState())
            else:
                self.pasts.append(ShardedCarriedState(communicator))

    def attach(self, number: int, span: Span) -> Span:
        """Returns the addresses of micro-batch `number` together with the state of its lanes."""
        return self.pasts[number].attach(span)

    def advance(self, number: int) -> None:
        """Makes what micro-batch `number` stored the state of the next step.

        Call it after the backward pass, on all ranks.
        """
        self.pasts[number].advance()

    def held(self) -> list[Held]:
        """Returns the state that this step reads, for `put_back`."""
        # References suffice: `advance` makes new tensors and leaves these as they are.
        return [(past.kept, past.addresses, past.states) for past in self.pasts]

    def put_back(self, held: list[Held]) -> None:
        """Restores the state from before a step that was skipped.

        The next step's rows then follow a gap in the text, so kept tokens count as those of another
        document.
        """
        for past, snapshot in zip(self.pasts, held):
            past.kept, past.addresses, past.states = snapshot

    def bytes(self) -> int:
        """Counts the bytes that are kept on this rank between steps."""
        return sum(past.bytes() for past in self.pasts)

    @torch.no_grad()
    def state(self) -> State:
        """Returns the state of all lanes, the same on every rank and for every number of ranks.

        All ranks call it together.
        """
        exports = [past.export_state() for past in self.pasts]
        state: State = {}
        # Sorted, because every path is a collective and ranks must agree on their order.
        for path in sorted(exports[0]):
            kind, name = path.split("/", 1)
            own_rows = torch.cat([export[path] for export in exports])
            state.setdefault(kind, {})[name] = self._all_rows(own_rows)
        return state

    def misfit(self, state: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """Describes how a state from a file differs from one that `state` returns, or None.

        Kept tokens must have the length that their kind says, and addresses; every tensor must have
        the run's rows.
        """
        for kind, tensors in state.items():
            # A kind of digits is the number of kept tokens; 18 of them still fit in int64.
            is_tokens = kind.isdecimal() and len(kind) < 19
            if not is_tokens and kind not in (REPLICATED, SHARDED):
                return f"its memory has an entry {kind!r} of no known kind"
            if is_tokens and not {"pos", "doc"} <= tensors.keys():
                return f"its memory has {kind} tokens without their addresses"
            leading = [self.rows, int(kind)] if is_tokens else [self.rows]
            min_dims = 1 if kind == REPLICATED else 2
            for name, tensor in tensors.items():
                shape = list(tensor.shape)
                if shape[: len(leading)] != leading or len(shape) < min_dims:
                    return f"its memory has {name} of the shape {shape} for {self.rows} rows"
                is_address = is_tokens and name in ("pos", "doc")
                if is_address and (tensor.dtype != torch.int64 or len(shape) != 2):
                    return f"its memory has {name} that is no address"
        return None

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Takes over a state that `state` returned, on any number of ranks."""
        first = self.mesh.data.rank * self.share.rows_per_rank
        size = self.share.micro_batch
        for number, past in enumerate(self.pasts):
            start = first + number * size
            stop = min(start + size, first + self.share.rows_per_rank)
            imported: dict[str, Tensor] = {}
            for kind, tensors in state.items():
                for name, tensor in tensors.items():
                    # Rows that fill up hold no document, so nothing attends to their tokens.
                    fill = -1 if name == "doc" else 0
                    rows = _padded_rows(tensor, start, stop, size, fill)
                    imported[f"{kind}/{name}"] = rows.to(self.mesh.device)
            past.import_state(imported)

    def _all_rows(self, own_rows: Tensor) -> Tensor:
        """Gathers [rows of this rank's micro-batches, ...] of every data rank into [R, ...]."""
        # The last micro-batch may be filled up, and so may the last data rank.
        rows = own_rows[: self.share.rows_per_rank].contiguous()
        if self.mesh.data.size > 1:
            parts = [torch.empty_like(rows) for _ in range(self.mesh.data.size)]
            dist.all_gather(parts, rows, group=self.mesh.data.group)
            rows = torch.cat(parts)
        return rows[: self.rows]


def in_pieces(
    share: BatchSharder, batch: Batch, lanes: Lanes | None = None, *, advance: bool = True
) -> Iterator[MicroBatch]:
    """Yields this rank's part of a batch, each micro-batch as the pieces of its rows.

    A model that is called with each of them once, in order and without a gradient, returns what it
    returns for whole rows.

    Args:
        share: cuts the batch; under parallel.time=1 a row is one piece.
        batch: the same on every rank.
        lanes: the carried state; None where rows carry nothing.
        advance: whether the next batch continues this one; False where this one is read again.
    """
    for number, (pieces, _) in enumerate(share.in_time(batch)):
        first = pieces[0]
        if lanes is not None:
            first = first.with_span(lanes.attach(number, first.span))
        if len(pieces) == 1:
            yield first
        else:
            state = piece_state([piece.span for piece in pieces], first.span.past)
            for index, piece in enumerate(pieces):
                yield piece.with_span(state.enter(index))
                trim_heap(piece.tokens.device)  # as run_in_pieces does
            state.end_first_pass()
        if lanes is not None and advance:
            lanes.advance(number)


def _padded_rows(tensor: Tensor, start: int, stop: int, size: int, fill: int) -> Tensor:
    """Returns rows start .. stop - 1 as far as they exist, filled up to `size` rows."""
    rows = tensor[start:stop]
    padding = rows.new_full((size - len(rows), *tensor.shape[1:]), fill)
    return torch.cat([rows, padding])
