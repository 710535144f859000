"""Three checks of the doctor: reach of each layer, evaluation parity, a rank of padding alone."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.loss import IGNORE
from models.masks.algebra import visible
from models.micro_batch import MicroBatch
from models.primitives.block_topk import BlockTopK
from models.primitives.causal_conv import CausalConv
from models.primitives.knn import KNN
from models.primitives.softmax import Softmax
from models.span import PADDING, Span
from parallel.layout import layouts
from parallel.mesh import Mesh
from parallel.sharding import shard_span
from trainer.config.schema import Config
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Cursor, Stream
from trainer.evaluation.held_out import HeldOutResult, evaluate
from trainer.verify.diagnosis import BOUND, Diagnosis, local_source, relative_error, worst_gradient

LAYER = re.compile(r"blocks\.\d+\.mixer")
ROW, DOCUMENT = 0, 2  # of the packed rows: a document of 52 tokens
REACHED = 0.0  # a gradient is exact where nothing reaches, so any other is reach
FEW = 5  # tokens of a row that leaves some rank with padding alone


def check_reach(
    model: nn.Module, tokens: Tensor, span: Span, mesh: Mesh, source: MicroBatch | None = None
) -> Iterator[Diagnosis]:
    """Checks that in each layer the last token of a document depends on its first token.

    Each layer gets an input of its own, so that a layer that passes nothing on is not hidden by the
    others, and the gradient of the last token's output is taken: it is 0 only where nothing
    reaches.

    Args:
        model: shared by the ranks.
        tokens: [B, T] of the whole rows.
        span: addresses of this rank's tokens, with their sharding.
        mesh: the ranks; every rank makes the same calls.
        source: this rank's tokens of the source, where the model reads one.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    layers = {name: each for name, each in model.named_modules() if LAYER.fullmatch(name)}
    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(_cut(name, inputs)))
        handles.append(layer.register_forward_hook(_note(name, outputs)))
    local_tokens = tokens if span.sharding is None else span.sharding.shard(tokens, 0)
    try:
        model(MicroBatch(local_tokens, span, None, source))
    finally:
        for handle in handles:
            handle.remove()
    own_row = torch.zeros_like(span.doc, dtype=torch.bool)
    own_row[ROW] = span.doc[ROW] == DOCUMENT
    last_position = _largest(torch.where(own_row, span.pos, 0).max(), mesh)
    for name, layer in layers.items():
        output = outputs[name]
        is_last = own_row & (span.pos == int(last_position))
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(output.shape[-1], generator=generator, dtype=output.dtype)
        # Masked and not skipped: every rank takes part in the layer's backward pass.
        looked_at = (output * direction * is_last[..., None]).sum()
        [gradient] = torch.autograd.grad(looked_at, inputs[name], allow_unused=True)
        if gradient is None:
            gradient = torch.zeros_like(inputs[name])
        is_first = own_row & (span.pos == 0)
        figure = float(_largest((gradient.abs() * is_first[..., None]).max(), mesh))
        reason = "" if figure > REACHED else why_not(layer, int(last_position) + 1)
        passed = figure > REACHED or bool(reason)
        note = reason or ("must reach" if passed else "nothing reaches it, and no part says why")
        subject = f"{name}: last token from the first"
        yield Diagnosis("reach", subject, figure, REACHED, passed, note)


def why_not(layer: nn.Module, tokens: int) -> str:
    """Returns why the last token of a document does not depend on the first; "" for no reason."""
    span = Span.line(1, tokens)
    reasons = []
    for module in layer.modules():
        if isinstance(module, BlockTopK | KNN):
            reasons.append(f"{type(module).__name__} chooses what a token sees")
        elif isinstance(module, CausalConv):
            reasons.append("its filter is short")
        elif isinstance(module, Softmax):
            heads = torch.arange(1)
            if not visible(module.mask, span, span, heads)[..., -1, 0].any():
                reasons.append("its mask hides the first token")
    return ", ".join(dict.fromkeys(reasons))


def check_evaluation(
    reference: nn.Module, shared: nn.Module, row: MicroBatch, mesh: Mesh, config: Config
) -> Diagnosis:
    """Compares the held-out loss by position of the ranks with that of one device."""
    stream = OneBatch(row)
    results = []
    for model, place in ((reference, Mesh.alone()), (shared, mesh)):
        share = BatchSharder(
            place,
            rows=stream.rows,
            context_length=row.tokens.shape[1],
            micro_batch="auto",
            policy=config.parallel.layout,
        )
        result = evaluate(model, share, stream, 1, lambda *_: False)
        assert result is not None, "no signal interrupts it"
        results.append(result)
    expected, actual = (_losses(result) for result in results)
    figure = float("inf")
    if len(expected) == len(actual):
        figure = relative_error(actual, expected)
    return _line("evaluation", "held-out loss by position", figure, mesh)


def _losses(result: HeldOutResult) -> Tensor:
    return torch.tensor([cell["loss"] for cell in result.by_position], dtype=torch.float64)


class OneBatch(Stream):
    """A stream of one batch, whose targets are given."""

    def __init__(self, row: MicroBatch):
        self.rows = len(row.tokens)
        self.batches = 1
        self.fingerprint = "doctor"
        source = None if row.source is None else _longer(row.source)
        self.batch = _longer(row)._replace(source=source)

    def start(self) -> Cursor:
        return {"rows": 0}

    def read(self, cursor: Cursor) -> tuple[Batch, Cursor]:
        return self.batch, cursor

    def describe(self, steps: int | None = None) -> str:
        return "the doctor's packed rows"


def _longer(row: MicroBatch) -> Batch:
    """Returns tokens as a Batch, which has one more than the model reads, without a source."""

    def longer(column: Tensor, fill: int) -> Tensor:
        return torch.cat([column, torch.full_like(column[:, :1], fill)], 1)

    pos, doc, role = row.span.addresses()
    aims = None if row.targets is None else longer(row.targets, IGNORE)
    return Batch(longer(row.tokens, 0), longer(doc, PADDING), longer(pos, 0), longer(role, 0), aims)


def check_padding_rank(
    reference: nn.Module, shared: nn.Module, row: MicroBatch, mesh: Mesh
) -> Diagnosis:
    """Compares losses and gradients where some ranks hold padding and no token.

    The rows are cut after a few tokens and lie contiguously, so that only the first rank has any.
    """
    tokens, span, targets, source = row
    assert targets is not None, "losses are compared"
    is_kept = torch.arange(tokens.shape[1]) < FEW
    doc = torch.where(is_kept, span.doc, PADDING)
    short = Span.of(torch.where(is_kept, span.pos, 0), doc, torch.where(is_kept, span.role, 0))
    aims = torch.where(is_kept, targets, IGNORE)
    local = shard_span(short, layouts("contiguous", short, mesh.context.size), mesh.context.rank)
    counts = torch.tensor(float(local.valid().any()))
    dist.all_reduce(counts, group=mesh.context.group)
    empty = mesh.context.size - int(counts)
    reference.zero_grad()
    shared.zero_grad()
    expected = reference(MicroBatch(tokens, short, aims, source))
    expected.sum().backward()
    sharding = local.sharding
    own_source = local_source(source, "contiguous", mesh)
    own = MicroBatch(sharding.shard(tokens, 0), local, sharding.shard(aims, IGNORE), own_source)
    losses = shared(own)
    losses.sum().backward()
    figure = relative_error(losses.detach(), sharding.shard(expected.detach(), 0))
    actual: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for (name, one), many in zip(reference.named_parameters(), shared.parameters(), strict=True):
        actual[name] = torch.zeros_like(many) if many.grad is None else many.grad
        dist.all_reduce(actual[name], group=mesh.context.group)
        wanted[name] = torch.zeros_like(one) if one.grad is None else one.grad
    figure = max(figure, worst_gradient(actual, wanted)[0])
    note = f"{empty} of {mesh.context.size} ranks hold no token"
    return _line("padding", "a rank that holds only padding", figure, mesh, note)


def _cut(name: str, inputs: dict[str, Tensor]) -> Callable[..., tuple]:
    """Returns a hook that gives a layer an input without history, and notes it."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        inputs[name] = args[0].detach().requires_grad_()
        return (inputs[name], *args[1:])

    return hook


def _note(name: str, outputs: dict[str, Tensor]) -> Callable[..., None]:
    """Returns a hook that notes what a layer gives; of several tensors the first."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        outputs[name] = output if isinstance(output, Tensor) else output[0]

    return hook


def _largest(value: Tensor, mesh: Mesh) -> Tensor:
    """Returns the largest value of any rank."""
    largest = value.detach().double()
    if mesh.context.group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=mesh.context.group)
    return largest


def _line(check: str, subject: str, figure: float, mesh: Mesh, note: str = "") -> Diagnosis:
    """Makes a line of the largest figure of any rank; NaN counts as infinite."""
    known = torch.tensor(figure, dtype=torch.float64).nan_to_num(nan=torch.inf, posinf=torch.inf)
    worst = float(_largest(known, mesh))
    return Diagnosis(check, subject, worst, BOUND, worst < BOUND, note)
