"""Checks that all ranks derived the same settings, data, batches and weights.

Ranks that share a row must hold the same row, and no later figure would show that they do not. So
the ranks compare hashes: of the rows of a step, and of their place in the data, in the all-reduce
that asks for signals before every step; of everything that a run begins with once, by a gather of a
few bytes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from parallel.engines.base import Engine
from parallel.engines.replica_checks import compare, compare_tensors, held, split
from parallel.mesh import Mesh
from trainer.config.own.source import source_hashes
from trainer.data.batch import Batch
from trainer.data.streams.base import Cursor, OwnRows, Stream
from trainer.errors import BAD_RUN, UserError

MARK_BYTES = 6  # a float64 holds integers of 53 bits exactly
REMEDY = (
    "give every machine the same files, tokenizer and versions of the packages (environment.json"
    " lists them), then run the same command again"
)


class Disagreement(UserError):
    """Ranks derived different things, so nothing that they compute together has a meaning."""


class Marks(NamedTuple):
    """Hashes of what a rank read for a step; 0 = nothing to compare.

    Attributes:
        step: of the place in the data before and behind the batch, and of all its rows where all
            were read: the same on every rank.
        rows: of the rows of this data rank: the same on all ranks that share them.
    """

    step: int = 0
    rows: int = 0


def marks_of(rows: OwnRows, cursor: Cursor, fingerprint: str) -> Marks:
    """Returns the marks of rows, whose documents are numbered over the step.

    Args:
        cursor: where they were read.
        fingerprint: of the data.
    """
    place = _json([fingerprint, cursor, rows.cursor])
    step = mark(rows.whole, place) if rows.whole is not None else _number(place)
    return Marks(step, mark(rows.batch, fingerprint))


def mark(batch: Batch, fingerprint: str = "") -> int:
    """Returns a hash of a batch and of the data that it came from; never 0."""
    return _number(fingerprint, [tensor.contiguous().numpy().data for tensor in batch.tensors()])


def _number(text: str, parts: Sequence[memoryview] = ()) -> int:
    seen = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=MARK_BYTES)
    for part in parts:
        seen.update(part)
    return int.from_bytes(seen.digest(), "little") or 1


def differing_batch(mesh: Mesh, mine: Marks, what: str) -> UserError:
    """Returns the error about ranks whose marks differ, with the ranks in the minority named.

    Collective.
    """
    marks = torch.zeros(mesh.world.size, 2, dtype=torch.float64, device=mesh.device)
    marks[mesh.world.rank] = marks.new_tensor(mine)
    dist.all_reduce(marks, group=mesh.world.group)
    everyone = list(enumerate(marks.tolist()))
    share = mesh.context.size
    compared = [(0, everyone), *((1, everyone[i : i + share]) for i in range(0, len(marks), share))]
    others, most, reader = [], [], "every rank"
    for column, ranks in compared:
        sides: dict[float, list[int]] = {}
        for rank, numbers in ranks:
            sides.setdefault(numbers[column], []).append(rank)
        if len(sides) > 1:
            others, most = split(sides)
            reader = "all that share its rows" if column else reader
            break
    return Disagreement(
        f"{what}: {_ranks(others)} read another batch than {_ranks(most)}, though {reader} must"
        " read the same; the run ends before anything is computed from it, and the last checkpoint"
        f" is intact; {REMEDY}",
        BAD_RUN,
    )


def agree(mesh: Mesh, facts: Mapping[str, Any], when: str) -> None:
    """Compares facts that every rank derived for itself. Collective.

    Raises:
        Disagreement: on every rank, where a fact differs.
    """
    texts = {
        name: hashlib.blake2b(_json(fact).encode(), digest_size=16).hexdigest()
        for name, fact in facts.items()
    }
    if difference := compare({"": texts}, mesh.world.group):
        raise Disagreement(
            f"{when}: {difference.name} of {_ranks(difference.others)} differ from those of"
            f" {_ranks(difference.most)}, though all must have the same; {REMEDY}",
            BAD_RUN,
        )


def agree_on_weights(mesh: Mesh, engine: Engine, when: str) -> None:
    """Compares the weights that more than one rank holds. Collective.

    Raises:
        Disagreement: on every rank, where two copies differ.
    """
    if difference := compare_tensors(held(engine), mesh.world.group):
        raise Disagreement(
            f"{when}: {difference.name} of {_ranks(difference.others)} has other numbers than on"
            f" {_ranks(difference.most)}, though it is to be the same; {REMEDY}",
            BAD_RUN,
        )


def agree_on_run(
    mesh: Mesh, engine: Engine, settings: Mapping[str, Any], stream: Stream, held_out: Stream | None
) -> None:
    """Ends a run on every rank where the ranks have built it differently. Collective."""
    when = "after the run was built"
    facts = {
        "the settings": settings,
        "the source of your own parts": source_hashes(settings),
        "the training data": stream.fingerprint,
    }
    if held_out is not None:
        facts["the held-out data"] = held_out.fingerprint
    agree(mesh, {**facts, "the initial weights": engine.drawn}, when)
    agree_on_weights(mesh, engine, when)


def agree_on_resumed(mesh: Mesh, engine: Engine, progress: Mapping[str, Any], place: Path) -> None:
    """Ends a run on every rank where ranks have read a checkpoint differently. Collective."""
    when = f"after resuming from {place}"
    agree(mesh, {"the place to go on from": progress}, when)
    agree_on_weights(mesh, engine, when)


def _json(fact: Any) -> str:
    return json.dumps(fact, sort_keys=True, default=str)


def _ranks(numbers: list[int]) -> str:
    """Returns 'rank 3', or 'ranks 0, 1 and 2'; of more than eight the first ones."""
    if len(numbers) == 1:
        return f"rank {numbers[0]}"
    shown = [str(number) for number in numbers[:8]]
    last = f"{len(numbers) - len(shown)} more" if len(numbers) > len(shown) else shown.pop()
    return f"ranks {', '.join(shown)} and {last}"
