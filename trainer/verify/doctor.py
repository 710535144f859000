"""Does this config keep the promise? Proved on the user's own model, made small in size but not in
kind, before step 1.

    parity      losses and every gradient, cut over the ranks, against one device (float64)
    causality   a later token changed: nothing before it moves
    documents   a document changed: nothing in another one moves
    padding     what stands in padding changed: nothing moves
    reach       a token changed: something after it moves (else the three above prove nothing)

`scripts/doctor.py` prints the table. The doctor is itself tested: `doctor.break=` sabotages one
driver and must be caught.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.auxiliary import auxiliary_loss, reset_auxiliary
from models.carried_state import CarriedState
from models.init import init_rules, initial_tensor
from models.loss import IGNORE
from models.masks.algebra import visible
from models.primitive import Primitive
from models.primitives.softmax import Softmax
from models.span import Span
from parallel.carried_state import ShardedCarriedState
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.mesh import Mesh
from parallel.sharding import shard_span
from trainer.config.build_model import build_model
from trainer.config.schema import Config
from trainer.objectives.stream import objective_of
from trainer.objectives.trial import trial, trial_symbols
from trainer.run_dir import plain_config

TOKENS = 121
VOCABULARY = 29
HEAD_WIDTH = 8
BOUND = 1e-11  # of a tensor's largest magnitude, in float64
COUNTS_TOKENS = (
    "window",
    "size",
    "chunk_size",
    "block",
    "length",
    "every",
    "top",
    "segment",
)  # settings that shrink with the row
BREAKS = ("mask", "scale", "leak", "order")


@dataclass(frozen=True)
class Diagnosis:
    """One line of the table: `figure` must stay under `bound` (or, for `reach`, above it)."""

    check: str
    what: str
    figure: float
    bound: float
    fine: bool
    note: str = ""


def small_twin(config: Config) -> Config:
    """The same kinds of layers, heads and method, in a model that fits in a moment."""
    ratio = TOKENS / config.context_length
    tree = copy.deepcopy(plain_config(config))
    model = tree["model"]
    pattern = len(model["pattern"]) if tree["mixer"] is None else 1
    pattern = max(pattern, 1 if model["feedforward"] else len(model["feedforward_pattern"]))
    model |= {
        "width": HEAD_WIDTH * model["heads"],
        "ffn": 2 * HEAD_WIDTH * model["heads"],
        "vocabulary": None,
    }
    model["layers"] = min(model["layers"], max(2, pattern))
    for node in [
        *model["mixers"].values(),
        *([tree["mixer"]] if tree["mixer"] else []),
        tree["memory"],
    ]:
        for key in COUNTS_TOKENS:
            if node.get(key) and ratio < 1:
                node[key] = _fewer(node[key], ratio)
    tree |= {"context_length": TOKENS, "batch_tokens": 2 * TOKENS, "precision": "float64"}
    return Config.model_validate(tree)


def _fewer(value: Any, ratio: float) -> Any:
    return (
        [_fewer(v, ratio) for v in value]
        if isinstance(value, list)
        else max(2, round(value * ratio))
    )


ALONE = ([37, 1, 52, 23], [5, 90, 19])  # lengths of the documents of two rows; the rest is padding
LANES = (
    [37, 1, 52, 60, 1, 80],
    [5, 90, 147],
)  # of two lanes, for a memory: two rows each, cut inside a document


def rows(lengths: Sequence[Sequence[int]] = ALONE, first: int = 0) -> Span:
    """Packed rows of uneven documents, one of a single token, and some padding: tokens `first` and
    on of each lane."""
    pos = torch.zeros(2, first + TOKENS, dtype=torch.long)
    doc = torch.full((2, first + TOKENS), -1)
    for row, lane in enumerate(lengths):
        start = 0
        for number, length in enumerate(lane):
            stop = min(start + length, first + TOKENS)
            pos[row, start:stop] = torch.arange(stop - start)
            doc[row, start:stop] = number
            start = stop
    return Span.of(pos[:, first:], doc[:, first:])


def built(config: Config) -> nn.Module:
    """The small model with weights large enough for every term to count (a layer that starts at 0
    would hide its faults)."""
    vocabulary = trial_symbols(objective_of(config), VOCABULARY, TOKENS).vocabulary
    model = build_model(config, vocabulary).double()
    known = init_rules(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = initial_tensor(model, name, 1).double() if name in known else parameter.clone()
            spread_out = torch.randn(
                parameter.shape,
                generator=torch.Generator().manual_seed(len(name)),
                dtype=torch.float64,
            )
            parameter.copy_(
                noise + spread_out * (parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1)
            )
    return model


class Examination:
    """One model on one device and the same model cut over the ranks of `mesh`; every rank does the
    same.

    Args:
        config: the user's own.
        mesh: ranks that all share one sequence.
        sabotage: one of BREAKS, or None.
    """

    def __init__(self, config: Config, mesh: Mesh, sabotage: str | None = None):
        self.config = small_twin(config)
        self.mesh = mesh
        self.span = rows()
        self.one = built(self.config)
        self.many = built(self.config)
        apply_context_parallel(
            self.many, mesh.context.group, config.parallel.method, grid=mesh.grid
        )
        if sabotage is not None:
            _sabotage(self.many, sabotage)
        self.layouts = layouts(
            config.parallel.layout, self.span, mesh.context.size, heads=mesh.ulysses.size
        )
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCABULARY, self.span.shape, generator=generator)

    def findings(self) -> Iterator[Diagnosis]:
        """Every line of the table, the same on every rank."""
        yield from self._parity()
        before = self._logits(self.tokens)
        yield from self._probe(before)

    def _cut(self, x: Tensor, fill: float) -> tuple[Tensor, Span]:
        here = shard_span(self.span, self.layouts, self.mesh.context.rank)
        return here.sharding.shard(x, fill), here

    def _parity(self) -> Iterator[Diagnosis]:
        """One row of each lane; with a memory two, the second of which goes on from the first."""
        carries = self.config.memory.carries
        pasts = (
            (CarriedState(), ShardedCarriedState(Communicator(self.mesh.context.group)))
            if carries
            else (None, None)
        )
        for number, span in enumerate(
            [rows(LANES), rows(LANES, TOKENS)] if carries else [self.span]
        ):
            error = self._compared(span, *pasts)
            yield self._line("parity", "losses of rows that go on" if number else "losses", error)
        yield self._gradients()

    def _compared(self, span: Span, past: CarriedState | None, dealt: CarriedState | None) -> float:
        """How far the losses of a row differ; adds up gradients."""
        tokens, span, targets = self._learned(span)
        cut = layouts(
            self.config.parallel.layout, span, self.mesh.context.size, heads=self.mesh.ulysses.size
        )
        here = shard_span(span, cut, self.mesh.context.rank)
        reset_auxiliary(self.one)
        reset_auxiliary(self.many)
        want = self.one(tokens, past.attach(span) if past else span, targets)
        _summed(self.one, want).backward()
        part = here.sharding.shard(tokens, 0)
        aims = here.sharding.shard(targets, IGNORE)
        got = self.many(part, dealt.attach(here) if dealt else here, aims)
        _summed(self.many, got).backward()
        for each in (past, dealt):
            if each is not None:
                each.advance()
        return _relative(got.detach(), here.sharding.shard(want.detach(), 0))

    def _learned(self, span: Span) -> tuple[Tensor, Span, Tensor]:
        """Tokens, addresses and targets [B, T] that the run's objective makes of the doctor's
        rows."""
        objective = objective_of(self.config)
        if not objective.rewrites:
            return self.tokens, span, _targets(self.tokens, span)
        return trial(objective, self.tokens, span, VOCABULARY, self.config.seed)

    def _gradients(self) -> Diagnosis:
        worst = 0.0
        where = "no parameter"
        for (name, a), b in zip(
            self.one.named_parameters(), self.many.named_parameters(), strict=True
        ):
            grad = torch.zeros_like(b[1]) if b[1].grad is None else b[1].grad
            dist.all_reduce(grad, group=self.mesh.context.group)
            error = _relative(grad, torch.zeros_like(a) if a.grad is None else a.grad)
            worst, where = max((worst, where), (error, name))
        count = sum(1 for _ in self.one.parameters())
        return self._line(
            "parity",
            f"gradients of {count} parameters",
            worst,
            note=f"worst: {where}" if worst else "",
        )

    @torch.no_grad()
    def _logits(self, tokens: Tensor) -> Tensor:
        """[B, T, V] on every rank: what the cut model says of the whole rows."""
        part, here = self._cut(tokens, 0)
        logits = self.many(part, here)
        every = [torch.zeros_like(logits) for _ in range(self.mesh.context.size)]
        dist.all_gather(every, logits.contiguous(), group=self.mesh.context.group)
        return here.sharding.to_global_order(torch.cat(every, 1))[:, :TOKENS]

    def _probe(self, before: Tensor) -> Iterator[Diagnosis]:
        """Change something, and look at what moves."""
        doc = self.span.doc
        pos = self.span.pos
        victim = (doc == 1) & (pos == 20) if (doc[1] == 1).sum() > 20 else doc == 1
        victim[0] = (doc[0] == 2) & (pos[0] == 20)
        moved = self._moved(victim, before)
        same = torch.stack([doc[row] == doc[row][victim[row]][0] for row in range(len(doc))])
        earlier = same & (pos < 20)
        ahead = self._sees_ahead()
        if ahead:
            note = f"not asked: {ahead} looks ahead by design"
            yield Diagnosis("causality", "tokens before a changed one", 0.0, BOUND, True, note)
        else:
            yield self._line("causality", "tokens before a changed one", _largest(moved, earlier))
        yield self._line(
            "documents", "tokens of other documents", _largest(moved, ~same & self.span.valid())
        )
        after = _largest(moved, same & (pos > 20))
        yield Diagnosis(
            "reach", "tokens after a changed one", after, 1e-9, after > 1e-9, "must move"
        )
        whole = (doc == doc[:, :1]) & self.span.valid()
        moved = self._moved(whole, before)
        yield self._line(
            "documents",
            "after a whole document changed",
            _largest(moved, ~whole & self.span.valid()),
        )
        moved = self._moved(~self.span.valid(), before)
        yield self._line("padding", "every token", _largest(moved, self.span.valid()))

    def _moved(self, victims: Tensor, before: Tensor) -> Tensor:
        """[B, T] how far the logits move when the victims become other tokens; what is not finite
        moved infinitely."""
        after = self._logits(torch.where(victims, (self.tokens + 7) % VOCABULARY, self.tokens))
        return (after - before).abs().amax(-1).nan_to_num(nan=torch.inf) / before.abs().max()

    def _sees_ahead(self) -> str:
        """The mixers whose own mask shows a later token of the same document."""
        span = Span.line(1, 64)
        found = []
        for name, leaf in self.one.named_modules():
            if isinstance(leaf, Softmax):
                seen = visible(leaf.mask, span, span, torch.arange(self.config.model.heads))
                if (seen & (span.pos[:, None, :, None] < span.pos[:, None, None, :])).any():
                    found.append(type(self.one.get_submodule(name.rpartition(".")[0])).__name__)
        return ", ".join(sorted(set(found)))

    def _line(self, check: str, what: str, figure: float, note: str = "") -> Diagnosis:
        worst = torch.tensor(figure if figure == figure else float("inf"), dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.mesh.context.group)
        return Diagnosis(check, what, worst.item(), BOUND, worst.item() < BOUND, note)


def _summed(model: nn.Module, losses: Tensor) -> Tensor:
    """[] what is trained on: the losses, and those that layers left of their own."""
    return losses.sum() + sum(auxiliary_loss(model).values())


def _relative(got: Tensor, want: Tensor) -> float:
    if not got.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()


def _targets(tokens: Tensor, span: Span) -> Tensor:
    """[B, T]: the next token of the same document, IGNORE where there is none."""
    ends = torch.roll(span.doc, -1, 1) != span.doc
    ends[:, -1] = True
    return torch.where(ends | ~span.valid(), IGNORE, torch.roll(tokens, -1, 1))


def _largest(moved: Tensor, where: Tensor) -> float:
    return moved[where].max().item() if where.any() else 0.0


def _sabotage(model: nn.Module, kind: str) -> None:
    """Break the first driver that there is, in one of four ways."""
    drivers = [m for m in model.modules() if hasattr(m, "core") and isinstance(m.core, Primitive)]
    if not drivers:
        raise ValueError(f"doctor.break={kind} needs a driver to break, and this model has none")
    driver = drivers[0]
    forward = drivers[0].forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_bent(a, kind) for a in args)
        out = forward(*args, **{key: _bent(value, kind) for key, value in kwargs.items()})
        return out * 1.001 if kind == "scale" else out

    driver.forward = broken


def _bent(value: Any, kind: str) -> Any:
    """A Span that lies: all positions equal (mask), all documents one (leak), or the ranks' parts
    exchanged (order)."""
    if not isinstance(value, Span) or kind == "scale":
        return value
    if kind == "order":
        cut = value.sharding
        turned = replace(
            cut,
            layouts=tuple(replace(r, runs=(*r.runs[1:], r.runs[0])) for r in cut.layouts),
            orders=[],
        )
        spans = (*cut.spans[1:], cut.spans[0])
        return replace(value, sharding=replace(turned, spans=spans), plans={})
    lie = _flat if kind == "mask" else _one_document
    cut = replace(
        value.sharding, spans=tuple(map(lie, value.sharding.spans)), whole=lie(value.sharding.whole)
    )
    return replace(lie(value), sharding=cut)


def _flat(span: Span) -> Span:
    return Span(torch.zeros_like(span.pos), span.doc, span.role)


def _one_document(span: Span) -> Span:
    pos = torch.arange(span.shape[1]).expand_as(span.pos)
    return Span(torch.where(span.valid(), pos, 0), torch.where(span.valid(), 0, -1), span.role)
