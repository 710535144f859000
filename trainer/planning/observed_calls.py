"""The calls by which a model chooses kernels, seen in a forward pass without numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.kernels import blockwise, grouped_mm, scan_fla
from models.kernels.blockwise import AttentionSpec
from models.micro_batch import MicroBatch
from models.primitive import Primitive
from models.span import Span
from parallel.engines.base import blocks_of
from parallel.engines.materialize import materialize
from parallel.engines.single import cast_inputs
from trainer.config.build_model import build_model
from trainer.config.schema import Config
from trainer.planning.without_numbers.fake_arithmetic import FakeArithmetic

TOKENS = 64  # of the row that is passed through the model; kernels are chosen for others later
CHOOSING = ("Softmax", "PooledAttention", "PointAttention", "Scan")


class TensorLike(NamedTuple):
    """A dtype and a shape, on a device that need not be here; all that a choice reads."""

    dtype: torch.dtype
    shape: torch.Size
    device: torch.device

    is_meta = False

    def dim(self) -> int:
        """Returns the number of dims."""
        return len(self.shape)

    def element_size(self) -> int:
        """Returns the bytes of an element."""
        return self.dtype.itemsize


class AttentionCall(NamedTuple):
    """Softmax attention under a spec, of q, k and v as a kernel would get them."""

    spec: AttentionSpec
    operands: tuple[TensorLike, ...]


class ScanCall(NamedTuple):
    """A scan of these tensors."""

    query: tuple[TensorLike, ...]
    payload: tuple[TensorLike, ...]
    before: bool


class ExpertCall(NamedTuple):
    """A grouped product of rows with stacks of matrices."""

    rows: TensorLike
    weight: TensorLike


class PlainCall(NamedTuple):
    """A primitive that computes by operations of torch, or by none."""

    primitive: str


Call = AttentionCall | ScanCall | ExpertCall | PlainCall


class Observed(NamedTuple):
    """A call, and the name of the module in whose forward it was made."""

    place: str
    call: Call


def observe_calls(config: Config, vocabulary: int, device: torch.device) -> list[Observed]:
    """Returns the calls of one forward pass, in their order.

    Args:
        config: of the run.
        vocabulary: tokens that the data has.
        device: on which the tensors are said to lie.
    """
    with torch.device("meta"):
        model = build_model(config, vocabulary)
    found: list[Observed] = []
    watch = _Watch(found, device)
    with FakeArithmetic(), torch.no_grad():
        materialize(model, torch.device("cpu"), config.seed)
        if config.precision == "bfloat16":
            for parameter in model.parameters():
                parameter.data = parameter.data.to(torch.bfloat16)
            for module in (model, *blocks_of(model)):
                module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        tokens = torch.zeros(1, TOKENS, dtype=torch.long)
        with watch.modules(model), watch.kernels():
            model(MicroBatch(tokens, Span.line(1, TOKENS), tokens))
    return found


class _Watch:
    """Notes calls with the module at work."""

    def __init__(self, found: list[Observed], device: torch.device):
        self.found = found
        self.device = device
        self.working = [""]

    def note(self, call: Call) -> None:
        self.found.append(Observed(self.working[-1], call))

    def like(self, tensor: Tensor) -> TensorLike:
        return TensorLike(tensor.dtype, tensor.shape, self.device)

    def likes(self, tensors: Any) -> tuple[TensorLike, ...]:
        return tuple(self.like(tensor) for tensor in tensors)

    @contextmanager
    def modules(self, model: nn.Module) -> Iterator[None]:
        """Keeps `working` at the module whose forward runs."""
        handles = []
        for name, module in model.named_modules():

            def enter(module: nn.Module, _: Any, name: str = name) -> None:
                self.working.append(name)
                kind = type(module).__name__
                if isinstance(module, Primitive) and kind not in CHOOSING:
                    self.note(PlainCall(kind))

            def leave(*_: Any) -> None:
                self.working.pop()

            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Listens where kernels are chosen."""
        attend = blockwise.forward
        select_scan = scan_fla.select_kernel
        select_product = grouped_mm._select

        def attend_and_note(spec: AttentionSpec, query: Any, payload: Any, params: Any, *rest: Any):
            operands = spec.score.operands(query, payload, params)
            self.note(AttentionCall(spec, self.likes(operands)))
            return attend(spec, query, payload, params, *rest)

        def select_scan_and_note(query: Any, payload: Any, *, before: bool):
            self.note(ScanCall(self.likes(query), self.likes(payload), before))
            return select_scan(query, payload, before=before)

        def select_product_and_note(x: Tensor, weight: Tensor):
            self.note(ExpertCall(self.like(x), self.like(weight)))
            return select_product(x, weight)

        blockwise.forward = attend_and_note
        scan_fla.select_kernel = select_scan_and_note
        grouped_mm._select = select_product_and_note
        try:
            yield
        finally:
            blockwise.forward = attend
            scan_fla.select_kernel = select_scan
            grouped_mm._select = select_product
