"""Plans are asked again of other addresses, by ways alone, and what is of one step is not kept."""

from typing import NamedTuple

import torch

from models.micro_batch import MicroBatch
from models.plans import PlanLog, planned
from models.span import Span
from parallel.layout import layout
from parallel.sharding import shard_span

made: list = []


class Runs(NamedTuple):
    lengths: list[int]
    span: Span


@planned
def runs(span: Span) -> Runs:
    def build() -> Runs:
        made.append(("runs", span))
        lengths = span.doc[0].bincount().tolist()
        return Runs(lengths, span.map(lambda tensor: tensor.flip(1)))

    return span.cache.get("runs", build)


@planned
def blocks(setting: object, span: Span, kv_span: Span, heads: torch.Tensor) -> list:
    def build() -> list:
        made.append(("blocks", span, kv_span, heads.tolist()))
        return []

    return span.cache.get(("blocks", setting, len(heads)), build, kv_span)


@planned
def chunks(span: Span, lengths: list[int]) -> int:
    def build() -> int:
        made.append(("chunks", lengths))
        return sum(lengths)

    return span.cache.get(("chunks", tuple(lengths)), build)


def micro_batch(documents: int, rank: int = 1) -> MicroBatch:
    doc = (torch.arange(12) * documents // 12)[None]
    pos = torch.arange(12)[None] - doc.eq(doc.mT).float().argmax(1)
    span = shard_span(Span.of(pos, doc), [layout("zigzag", 12, 3)], rank)
    return MicroBatch(torch.zeros(1, 4), span, source=MicroBatch(doc, Span.of(pos, doc)))


def layers(batch: MicroBatch) -> None:
    """Two layers ask alike, the first with rows that carry something."""
    for span in (batch.span.with_past(object()), batch.span):
        order = runs(span)
        chunks(span, order.lengths)
        for other in span.sharding.spans:
            blocks("causal", span, other, torch.arange(2))
        blocks("causal", span, order.span, torch.arange(2))
        blocks("within", span, span, torch.arange(2))
        blocks("across", span, batch.source.span, torch.arange(2))
        blocks("its own", span, span.map(lambda tensor: tensor + 0), torch.arange(2))
        chunks(span, [1, 2])


def test_the_plans_of_one_step_are_made_for_another_and_found_there():
    log = PlanLog()
    first, second = micro_batch(2), micro_batch(3)
    with log.listening(first):
        layers(first)
    assert len(log.calls) == 2 + 3 + 3, "spans and lists that no way leads to are no plan"
    made.clear()
    assert log.make(second) == len(log.calls)
    of = {name: [rest for kind, *rest in made if kind == name] for name, *_ in made}
    assert of["runs"] == [[second.span]]
    assert of["chunks"] == [[runs(second.span).lengths]]
    others = [kv for _, kv, _ in of["blocks"]]
    sharding = second.span.sharding
    reverse = runs(second.span).span
    assert others == [*sharding.spans, reverse, second.span, second.source.span]
    made.clear()
    layers(second)
    # Once for each layer, since its span is another each time; and what was given as a list.
    assert [rest[0] is second.span for kind, *rest in made if kind == "blocks"] == [False, True]
    assert [rest for kind, *rest in made if kind == "chunks"] == [[[1, 2]]]
    assert len(made) == 3


def test_nothing_is_noted_of_what_nobody_listens_to():
    log = PlanLog()
    batch = micro_batch(2)
    layers(batch)
    with log.listening(batch):
        pass
    layers(batch)
    assert not log.calls and log.make(micro_batch(3)) == 0


def test_spans_that_differ_in_their_past_are_one():
    log = PlanLog()
    first, second = micro_batch(2), micro_batch(3)
    with log.listening(first):
        runs(first.span.with_past(object()))
    assert log.make(second) == 1
