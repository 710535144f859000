"""Proves on the user's own config, before step 1, that sharing a sequence changes nothing.

The model keeps its kinds of layers, heads and method, but is made small.

    parity      losses and gradients on the ranks equal those of one device (float64)
    causality   a changed token moves nothing before it
    documents   a changed document moves nothing in another document
    padding     changed padding moves nothing
    reach       a changed token moves something after it (else the three above prove nothing); in
                each layer the last token of a document depends on the first, or the layer says why
                not
    evaluation  the held-out loss on the ranks is that of one device
    padding     a rank that holds only padding changes nothing

`scripts/doctor.py` prints the table. The checks are themselves tested: `doctor.break=` sabotages
one driver, which must be noticed.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.auxiliary import auxiliary_loss, reset_auxiliary
from models.carried_state import CarriedState
from models.causality import layers_ahead
from models.init import init_rules, initial_tensor
from models.loss import IGNORE
from models.micro_batch import MicroBatch
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
from trainer.verify.diagnosis import (
    BOUND,
    LANES,
    TOKENS,
    Diagnosis,
    example_source,
    local_source,
    packed_rows,
    relative_error,
    worst_gradient,
)
from trainer.verify.doctor_checks import check_evaluation, check_padding_rank, check_reach
from trainer.verify.sabotage import sabotage_driver

VOCABULARY = 29
HEAD_WIDTH = 8
LEAST_MOVE = 1e-9  # of the largest logit, that a changed token must move a later one by
CHANGED_POSITION = 20  # in its document, of the token that is changed
# Settings that count tokens, and shrink with the row.
COUNTS_TOKENS = (
    "window",
    "size",
    "chunk_size",
    "block",
    "length",
    "every",
    "top",
    "segment",
)


def small_twin(config: Config) -> Config:
    """Returns a config with the same kinds of layers, heads and method, and small sizes."""
    tree = copy.deepcopy(plain_config(config))
    model = tree["model"]
    # Every kind of layer in the pattern must occur at least once.
    pattern_length = 1
    if tree["mixer"] is None:
        pattern_length = len(model["pattern"])
    if not model["feedforward"]:
        pattern_length = max(pattern_length, len(model["feedforward_pattern"]))
    model["width"] = HEAD_WIDTH * model["heads"]
    model["ffn"] = 2 * HEAD_WIDTH * model["heads"]
    model["vocabulary"] = None
    model["layers"] = min(model["layers"], max(2, pattern_length))
    nodes = list(model["mixers"].values())
    if tree["mixer"]:
        nodes.append(tree["mixer"])
    nodes.append(tree["memory"])
    ratio = TOKENS / config.context_length
    if ratio < 1:
        for node in nodes:
            for key in COUNTS_TOKENS:
                if node.get(key):
                    node[key] = _scaled(node[key], ratio)
    tree["context_length"] = TOKENS
    tree["batch_tokens"] = 2 * TOKENS
    tree["precision"] = "float64"
    if "source_length" in tree["data"]:
        tree["data"]["source_length"] = None
    return Config.model_validate(tree)


def _scaled(value: Any, ratio: float) -> Any:
    """Shrinks a count, or every count of a list."""
    if isinstance(value, list):
        return [_scaled(item, ratio) for item in value]
    return max(2, round(value * ratio))


def build_noisy_model(config: Config) -> nn.Module:
    """Builds the model with weights large enough for every term to count.

    A layer that starts at 0 would hide its faults, so noise is added to every parameter.
    """
    vocabulary = trial_symbols(objective_of(config), VOCABULARY, TOKENS).vocabulary
    model = build_model(config, vocabulary).double()
    rules = init_rules(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in rules:
                initial = initial_tensor(model, name, 1).double()
            else:
                initial = parameter.clone()
            # A generator for each name, so that both copies of the model are equal.
            generator = torch.Generator().manual_seed(len(name))
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.1
            if parameter.dim() > 1:
                scale = parameter.shape[-1] ** -0.5
            parameter.copy_(initial + noise * scale)
    return model


class Examination:
    """Compares a model on one device with the same model shared by the ranks of `mesh`.

    Args:
        config: of the user's run.
        mesh: ranks that all share one sequence; every rank makes the same calls.
        sabotage: one of BREAKS (trainer/verify/sabotage.py), or None.
    """

    def __init__(self, config: Config, mesh: Mesh, sabotage: str | None = None):
        self.config = small_twin(config)
        self.mesh = mesh
        self.span = packed_rows()
        self.reference = build_noisy_model(self.config)
        self.shared = build_noisy_model(self.config)
        apply_context_parallel(
            self.shared, mesh.context.group, config.parallel.method, grid=mesh.grid
        )
        if sabotage is not None:
            sabotage_driver(self.shared, sabotage)
        self.layouts = layouts(
            config.parallel.layout, self.span, mesh.context.size, heads=mesh.ulysses.size
        )
        generator = torch.Generator().manual_seed(3)
        self.tokens = torch.randint(VOCABULARY, self.span.shape, generator=generator)
        self.source = example_source(self.reference, VOCABULARY)

    def findings(self) -> Iterator[Diagnosis]:
        """Yields every line of the table, the same on every rank."""
        yield from self.parity()
        before = self._logits(self.tokens)
        yield from self._check_changes(before)
        yield from self._check_source(before)
        yield from check_reach(
            self.shared, self.tokens, self._local_span(), self.mesh, self._local_source()
        )
        row = MicroBatch(*self._training_row(self.span), self.source)
        yield check_evaluation(self.reference, self.shared, row, self.mesh, self.config)
        yield check_padding_rank(self.reference, self.shared, row, self.mesh)

    def _local_span(self) -> Span:
        """Returns this rank's addresses of the packed rows."""
        return shard_span(self.span, self.layouts, self.mesh.context.rank)

    def _local_source(self, source: MicroBatch | None = None) -> MicroBatch | None:
        """Returns this rank's tokens of the source, or of another one; None where none is read."""
        chosen = self.source if source is None else source
        return local_source(chosen, self.config.parallel.layout, self.mesh)

    def _check_source(self, before: Tensor) -> Iterator[Diagnosis]:
        """Changes the source of one document and checks which logits move.

        Args:
            before: logits [B, T, V] of the unchanged source.
        """
        if self.source is None:
            return
        changed = self.source.span.doc == 1
        tokens = torch.where(changed, (self.source.tokens + 7) % VOCABULARY, self.source.tokens)
        after = self._logits(self.tokens, self.source._replace(tokens=tokens))
        moved = (after - before).abs().amax(-1).nan_to_num(nan=torch.inf) / before.abs().max()
        of_it = self.span.doc == 1
        figure = _largest(moved, ~of_it & self.span.valid())
        yield self._line("source", "rows of other documents", figure)
        figure = _largest(moved, of_it)
        subject = "rows of a document whose source changed"
        yield Diagnosis("source", subject, figure, LEAST_MOVE, figure > LEAST_MOVE, "must move")

    def parity(self) -> Iterator[Diagnosis]:
        """Compares losses and gradients; with a memory, of two rows that follow each other."""
        spans = [self.span]
        states = (None, None)
        if self.config.memory.carries:
            spans = [packed_rows(LANES), packed_rows(LANES, TOKENS)]
            communicator = Communicator(self.mesh.context.group)
            states = (CarriedState(), ShardedCarriedState(communicator))
        for number, span in enumerate(spans):
            error = self._loss_error(span, *states)
            subject = "losses of rows that go on" if number else "losses"
            yield self._line("parity", subject, error)
        yield self._compare_gradients()

    def _loss_error(
        self, span: Span, state: CarriedState | None, sharded_state: CarriedState | None
    ) -> float:
        """Returns the relative error of a row's losses; accumulates gradients in both models."""
        tokens, span, targets = self._training_row(span)
        row_layouts = layouts(
            self.config.parallel.layout, span, self.mesh.context.size, heads=self.mesh.ulysses.size
        )
        local_span = shard_span(span, row_layouts, self.mesh.context.rank)
        sharding = local_span.sharding
        reset_auxiliary(self.reference)
        reset_auxiliary(self.shared)

        attached = state.attach(span) if state else span
        expected = self.reference(MicroBatch(tokens, attached, targets, self.source))
        _total_loss(self.reference, expected).backward()

        local_tokens = sharding.shard(tokens, 0)
        local_targets = sharding.shard(targets, IGNORE)
        attached = sharded_state.attach(local_span) if sharded_state else local_span
        losses = self.shared(
            MicroBatch(local_tokens, attached, local_targets, self._local_source())
        )
        _total_loss(self.shared, losses).backward()

        for carried in (state, sharded_state):
            if carried is not None:
                carried.advance()
        return relative_error(losses.detach(), sharding.shard(expected.detach(), 0))

    def _training_row(self, span: Span) -> tuple[Tensor, Span, Tensor]:
        """Returns tokens, addresses and targets [B, T] as the run's objective makes them."""
        objective = objective_of(self.config)
        if not objective.rewrites:
            return self.tokens, span, _next_tokens(self.tokens, span)
        return trial(objective, self.tokens, span, VOCABULARY, self.config.seed)

    def _compare_gradients(self) -> Diagnosis:
        """Compares the gradient of every parameter, summed over the ranks; names the worst."""
        actual: dict[str, Tensor] = {}
        expected: dict[str, Tensor] = {}
        for (name, one), many in zip(
            self.reference.named_parameters(), self.shared.parameters(), strict=True
        ):
            # Every rank takes part in every sum, also where its own gradient is missing.
            actual[name] = torch.zeros_like(many) if many.grad is None else many.grad
            dist.all_reduce(actual[name], group=self.mesh.context.group)
            expected[name] = torch.zeros_like(one) if one.grad is None else one.grad
        largest_error, worst_name = worst_gradient(actual, expected)
        note = f"worst: {worst_name}" if largest_error else ""
        return self._line(
            "parity", f"gradients of {len(actual)} parameters", largest_error, note=note
        )

    @torch.no_grad()
    def _logits(self, tokens: Tensor, source: MicroBatch | None = None) -> Tensor:
        """Returns the shared model's logits [B, T, V] of the whole rows, on every rank."""
        local_span = self._local_span()
        sharding = local_span.sharding
        own_source = self._local_source(source)
        logits = self.shared(MicroBatch(sharding.shard(tokens, 0), local_span, None, own_source))
        parts = [torch.zeros_like(logits) for _ in range(self.mesh.context.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.mesh.context.group)
        return sharding.to_global_order(torch.cat(parts, 1))[:, :TOKENS]

    def _check_changes(self, before: Tensor) -> Iterator[Diagnosis]:
        """Changes tokens and checks which logits move.

        Args:
            before: logits [B, T, V] of the unchanged tokens.
        """
        doc = self.span.doc
        pos = self.span.pos
        valid = self.span.valid()
        changed = doc == 1
        if (doc[1] == 1).sum() > CHANGED_POSITION:
            changed = changed & (pos == CHANGED_POSITION)
        changed[0] = (doc[0] == 2) & (pos[0] == CHANGED_POSITION)
        moved = self._movement(changed, before)
        same_rows = []
        for row in range(len(doc)):
            same_rows.append(doc[row] == doc[row][changed[row]][0])
        same = torch.stack(same_rows)

        subject = "tokens before a changed one"
        mixers = self._mixers_that_look_ahead()
        if mixers:
            note = f"not asked: {mixers} looks ahead by design"
            yield Diagnosis("causality", subject, 0.0, BOUND, True, note)
        else:
            earlier = same & (pos < CHANGED_POSITION)
            yield self._line("causality", subject, _largest(moved, earlier))

        others = ~same & valid
        yield self._line("documents", "tokens of other documents", _largest(moved, others))

        subject = "tokens after a changed one"
        figure = _largest(moved, same & (pos > CHANGED_POSITION))
        yield Diagnosis("reach", subject, figure, LEAST_MOVE, figure > LEAST_MOVE, "must move")

        document = (doc == doc[:, :1]) & valid
        moved = self._movement(document, before)
        figure = _largest(moved, ~document & valid)
        yield self._line("documents", "after a whole document changed", figure)

        moved = self._movement(~valid, before)
        yield self._line("padding", "every token", _largest(moved, valid))

    def _movement(self, changed: Tensor, before: Tensor) -> Tensor:
        """Returns [B, T] how far logits move when the changed tokens [B, T] become others.

        NaN counts as an infinite movement.
        """
        tokens = torch.where(changed, (self.tokens + 7) % VOCABULARY, self.tokens)
        after = self._logits(tokens)
        distance = (after - before).abs().amax(-1).nan_to_num(nan=torch.inf)
        return distance / before.abs().max()

    def _mixers_that_look_ahead(self) -> str:
        """Names the layers that show a later token of the same document."""
        names = {layer.kind for layer in layers_ahead(self.reference)}
        return ", ".join(sorted(names))

    def _line(self, check: str, subject: str, figure: float, note: str = "") -> Diagnosis:
        """Makes a line of the largest figure of any rank; NaN counts as infinite."""
        if math.isnan(figure):
            figure = math.inf
        worst = torch.tensor(figure, dtype=torch.float64)
        dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=self.mesh.context.group)
        return Diagnosis(check, subject, worst.item(), BOUND, worst.item() < BOUND, note)


def _total_loss(model: nn.Module, losses: Tensor) -> Tensor:
    """Returns the sum [] of the losses and of the auxiliary losses of layers."""
    return losses.sum() + sum(auxiliary_loss(model).values())


def _next_tokens(tokens: Tensor, span: Span) -> Tensor:
    """Returns [B, T] the next token of the same document, IGNORE where there is none."""
    ends = torch.roll(span.doc, -1, 1) != span.doc
    ends[:, -1] = True
    return torch.where(ends | ~span.valid(), IGNORE, torch.roll(tokens, -1, 1))


def _largest(moved: Tensor, selected: Tensor) -> float:
    """Returns the largest movement of the selected tokens; 0 when none is selected."""
    if not selected.any():
        return 0.0
    return moved[selected].max().item()
