"""Proves on a tiny twin that layers which are not ours use the same parameters whatever the rows.

DeepSpeed's ranks exchange gradients, and at stage 3 parameters, as they come. A parameter that the
rows of one rank need and those of another do not makes them exchange different things, which ends a
run or adds up what does not belong together. Our own layers are built so that this cannot happen
(models/same_graph.py); fsdp and single reduce a missing gradient as zero.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from models.micro_batch import MicroBatch
from models.span import PADDING, Span
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.preflight.foreign import PAGE, strangers
from trainer.verify.diagnosis import example_source
from trainer.verify.doctor import VOCABULARY, build_noisy_model, packed_rows, small_twin


def check_same_gradients(config: Config) -> Iterator[Finding]:
    """Checks, where DeepSpeed has several ranks, that no layer's parameters depend on the rows."""
    class_names = strangers(config)
    if config.engine.name != "deepspeed" or config.parallel.ranks == 1 or not class_names:
        return
    layers = " and ".join(class_names)
    try:
        used = _tried(config)
    # A layer of the user's own may raise anything.
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        yield Finding(
            "engine",
            "deepspeed",
            f"{layers} could not be tried on unlike rows ({type(error).__name__}: {first_line}), so"
            " it is not known whether ranks would exchange the same gradients",
            "let it read documents of one token and rows of padding, or use engine=fsdp",
        )
        return
    everywhere = set.intersection(*used)
    only_some = sorted(set.union(*used) - everywhere)
    if only_some:
        yield Finding(
            "engine",
            "deepspeed",
            f"whether {only_some[0]} of {layers} is used depends on the rows, so"
            " ranks would exchange different gradients",
            f"give it a gradient in every row with models.same_graph.tied ({PAGE}), or use"
            " engine=fsdp",
        )


def _tried(config: Config) -> list[set[str]]:
    """Returns what each kind of row uses, in float64, or float32 where a layer knows no other."""
    twin = small_twin(config)
    try:
        model = build_noisy_model(twin).double()
        return [_used(model, span) for span in _unlike_rows()]
    except (RuntimeError, TypeError):
        model = build_noisy_model(twin).float()
        return [_used(model, span) for span in _unlike_rows()]


def _unlike_rows() -> list[Span]:
    """Returns rows that make a layer branch: long and short documents, padding alone."""
    packed = packed_rows()
    single = Span.of(torch.zeros_like(packed.pos), torch.arange(packed.shape[1]).expand(2, -1))
    padding = Span.of(torch.zeros_like(packed.pos), torch.full_like(packed.doc, PADDING))
    return [packed, single, padding]


def _used(model: nn.Module, span: Span) -> set[str]:
    """Returns the names of the parameters that get a gradient, and of modules that are called."""
    called: set[str] = set()
    handles = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters(recurse=False)):

            def note(module: nn.Module, given: object, name: str = name) -> None:
                called.add(f"{name} (its forward)")

            handles.append(module.register_forward_pre_hook(note))
    tokens = torch.randint(VOCABULARY, span.shape, generator=torch.Generator().manual_seed(3))
    source = example_source(model, VOCABULARY, span)
    outputs: Tensor = model(MicroBatch(tokens, span, None, source))
    outputs.sum().backward()
    for handle in handles:
        handle.remove()
    names = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return names | called
