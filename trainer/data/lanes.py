"""What lanes of the batch carry from step to step, on this rank; a checkpoint holds it as it would
be on one device.

Row i of a step goes on where row i of the step before ended. A Past belongs to the rows of one
micro-batch.
Letters: R rows of a step, over all ranks.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from models.carried_state import REPLICATED, SHARDED, CarriedState
from models.span import Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.mesh import Mesh
from trainer.data.batch_sharding import BatchSharder

State = dict[str, dict[str, Tensor]]  # {kind: {name: [R, ...]}}
Held = tuple[
    dict[str, tuple[int, Tensor]], dict[int, Span], dict[str, tuple[str, Tensor]]
]  # as in models.carried_state.CarriedState


class Lanes:
    """The Pasts of this rank's micro-batches.

    Args:
        mesh: the ranks.
        share: how a step's rows are cut into micro-batches.
        rows: R.
    """

    def __init__(self, mesh: Mesh, share: BatchSharder, rows: int):
        self.mesh = mesh
        self.share = share
        self.rows = rows
        communicator = Communicator(mesh.context.group) if mesh.context.size > 1 else None
        self.pasts = [
            CarriedState() if communicator is None else ShardedCarriedState(communicator)
            for _ in range(share.pieces)
        ]

    def attach(self, number: int, span: Span) -> Span:
        """The addresses of the micro-batch of that number, with what its lanes carry."""
        return self.pasts[number].attach(span)

    def advance(self, number: int) -> None:
        """The micro-batch is done, its backward too: what it left is what the next step finds. All
        ranks call."""
        self.pasts[number].advance()

    def held(self) -> list[Held]:
        """What the lanes find in this step, for `put_back`. `advance` makes new tensors, so nothing
        is copied."""
        return [(past.kept, past.addresses, past.states) for past in self.pasts]

    def put_back(self, held: list[Held]) -> None:
        """Forget what a step left that was not taken: kept tokens then meet a gap, and count as
        another document's."""
        for past, found in zip(self.pasts, held):
            past.kept, past.addresses, past.states = found

    def bytes(self) -> int:
        """Held on this rank between steps."""
        return sum(past.bytes() for past in self.pasts)

    @torch.no_grad()
    def state(self) -> State:
        """All that the lanes carry; the same on every rank, and on any number of them. All ranks
        call."""
        found: State = {}
        pieces = [past.export_state() for past in self.pasts]
        for path in sorted(pieces[0]):
            kind, name = path.split("/", 1)
            found.setdefault(kind, {})[name] = self._all_rows(
                torch.cat([piece[path] for piece in pieces])
            )
        return found

    def misfit(self, state: Mapping[str, Mapping[str, Tensor]]) -> str | None:
        """What tells a state that comes from a file from one that `state` gave, or None.

        Kept tokens have the length that their kind says, with addresses; all have the run's rows.
        """
        for kind, part in state.items():
            tokens = kind.isdecimal() and len(kind) < 19
            if not tokens and kind not in (REPLICATED, SHARDED):
                return f"its memory has an entry {kind!r} of no known kind"
            if tokens and not {"pos", "doc"} <= part.keys():
                return f"its memory has {kind} tokens without their addresses"
            wanted = [self.rows, int(kind)] if tokens else [self.rows]
            for name, tensor in part.items():
                shape = list(tensor.shape)
                least = 1 if kind == REPLICATED else 2
                if shape[: len(wanted)] != wanted or len(shape) < least:
                    return f"its memory has {name} of the shape {shape} for {self.rows} rows"
                if (
                    tokens
                    and name in ("pos", "doc")
                    and (tensor.dtype != torch.int64 or len(shape) != 2)
                ):
                    return f"its memory has {name} that is no address"
        return None

    def load(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what `state` gave, whatever ranks gave it."""
        first = self.mesh.data.rank * self.share.each
        device = self.mesh.device
        for number, past in enumerate(self.pasts):
            start = first + number * self.share.micro_batch
            stop = min(start + self.share.micro_batch, first + self.share.each)
            size = self.share.micro_batch
            past.import_state(
                {
                    f"{kind}/{name}": (
                        _rows(x, start, stop, size, fill=-1 if name == "doc" else 0).to(device)
                    )
                    for kind, part in state.items()
                    for name, x in part.items()
                }
            )

    def _all_rows(self, x: Tensor) -> Tensor:
        """[rows of this rank's micro-batches, ...] of every data rank -> [R, ...]; rows that only
        fill up are dropped."""
        x = x[: self.share.each].contiguous()
        if self.mesh.data.size > 1:
            every = [torch.empty_like(x) for _ in range(self.mesh.data.size)]
            dist.all_gather(every, x, group=self.mesh.data.group)
            x = torch.cat(every)
        return x[: self.rows]


def _rows(x: Tensor, start: int, stop: int, size: int, fill: int) -> Tensor:
    """Rows start .. stop - 1 as far as there are any, filled up to `size`."""
    part = x[start:stop]
    return torch.cat([part, part.new_full((size - len(part), *x.shape[1:]), fill)])
