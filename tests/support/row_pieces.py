"""Whole models over rows cut in time, for tests: losses, gradients, statistics, what is carried."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.auxiliary import auxiliary_loss, on_step_begin, reset_auxiliary, statistics
from models.carried_state import CarriedState
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.row_pieces import piece_state
from parallel.rows_in_time import run_in_pieces
from parallel.sharding import shard_span
from tests.support.decoders import WORDS, built
from tests.support.lanes import span as lane_span
from tests.support.parity import relative

STEPS = 3
# Models that carry something from row to row, and do so here.
CARRYING = ("memory", "lstm", "ntm")


class Sums(NamedTuple):
    """What some steps give: losses and statistics by name, gradients, and what is carried."""

    sums: dict[str, Tensor]
    gradients: dict[str, Tensor]
    carried: dict[str, Tensor]


def pieces_of(span: Span, sizes: list[int]) -> list[Span]:
    """Cuts addresses [B, T] into those of pieces."""
    parts = zip(*(field.split(sizes, 1) for field in span.addresses()), strict=True)
    return [Span(*part) for part in parts]


def inputs(step: int) -> tuple[Tensor, Tensor, Span]:
    """Tokens, targets and addresses of the rows of two lanes."""
    span = lane_span(step)
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, span.shape, generator=generator)
    following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    goes_on = torch.zeros_like(following, dtype=torch.bool)
    goes_on[:, :-1] = (span.doc[:, 1:] == span.doc[:, :-1]) & span.valid()[:, 1:]
    return tokens, torch.where(goes_on, following, IGNORE), span


def carries(name: str) -> bool:
    """Whether this model carries something from row to row."""
    return name.startswith(CARRYING)


def run_steps(
    model: nn.Module, past: CarriedState | None, sizes: list[int], shard: Any = None
) -> Sums:
    """Runs steps without updates between them; rows of a single piece are run as they are.

    Args:
        shard: (addresses of whole rows) -> those of this rank; None on one device.
    """
    sums: dict[str, Tensor] = {}

    def add(found: dict[str, Tensor]) -> None:
        for name, value in found.items():
            value = value.detach().double()
            sums[name] = sums[name] + value if name in sums else value

    model.zero_grad()
    for step in range(STEPS):
        tokens, targets, span = inputs(step)
        count = int((targets != IGNORE).sum())
        on_step_begin(model, step + 1)
        spans = pieces_of(span, sizes)
        parts = list(zip(tokens.split(sizes, 1), targets.split(sizes, 1), strict=True))
        if shard is not None:
            spans = [shard(piece) for piece in spans]
            parts = [
                (piece.sharding.shard(a, 0), piece.sharding.shard(b, IGNORE))
                for piece, (a, b) in zip(spans, parts, strict=True)
            ]
        first = spans[0] if past is None else past.attach(spans[0])

        def learn(number: int, at: Span, parts=parts, count=count) -> Tensor:
            reset_auxiliary(model)
            loss = model(MicroBatch(parts[number][0], at, parts[number][1])).sum() / count
            auxiliary = auxiliary_loss(model, tokens=count, rows=2)
            add({"loss": loss, **auxiliary, **statistics(model)})
            return loss + sum(auxiliary.values(), torch.zeros_like(loss))

        def look_ahead(number: int, at: Span, parts=parts) -> None:
            model(MicroBatch(parts[number][0], at, torch.full_like(parts[number][1], IGNORE)))

        if len(spans) == 1:
            learn(0, first).backward()
        else:
            run_in_pieces(
                piece_state(spans, past), look_ahead, learn, lambda loss, last: loss.backward()
            )
        if past is not None:
            past.advance()
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    return Sums(sums, gradients, {} if past is None else past.export_state())


@lru_cache(maxsize=2)
def whole(name: str) -> Sums:
    """The same steps on one device, rows as they are."""
    past = CarriedState() if carries(name) else None
    return run_steps(built(name).train(), past, [lane_span(0).shape[1]])


def differences(found: Sums, name: str) -> dict[str, float]:
    """Worst relative difference of everything from the whole rows."""
    worst: dict[str, float] = {}
    for part, wanted in zip(found, whole(name), strict=True):
        assert set(part) == set(wanted), set(part) ^ set(wanted)
        for key, value in wanted.items():
            worst[key] = relative(part[key].double(), value.double())
    return worst


def compare_model(
    env: Any, name: str, method: str, policy: str, sizes: list[int]
) -> dict[str, float]:
    """`differences` of rows in pieces over ranks."""
    model = built(name).train()
    apply_context_parallel(model, env.group, method)
    past = ShardedCarriedState(Communicator(env.group)) if carries(name) else None

    def shard(span: Span) -> Span:
        return shard_span(span, layouts(policy, span, env.size), env.rank)

    found = run_steps(model, past, sizes, shard)
    for tensor in (*found.sums.values(), *found.gradients.values()):
        dist.all_reduce(tensor, group=env.group)
    return differences(found, name)
