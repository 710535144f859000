"""Plans a deep model by two shallow ones, where its layers repeat.

Layers that are alike hold and compute alike. What is held at any one place of a step (before the
first layer, in the forward of the third, in the backward of the last but one, ...) is then a
straight line in the number of layers, and so are FLOPs, seconds and bytes sent. Both ends of a step
are planned as they are, with as many layers in between as it takes to see the line; what lies
further inside lies between the two innermost that are planned.

Exact but for one thing: `engine=single` sums gradients over ranks in buckets of 25 MiB, and how
these are filled is no line.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from trainer.config.build_model import feedforward_labels, mixer_labels
from trainer.config.schema import Config
from trainer.planning.watched_step import PlannedStretch

ENDS = 2  # repetitions that are kept at either end: the outermost, and one of those inside
OWN_NAME = "place"  # attribute of a module that holds its name in the model


class Repetition(NamedTuple):
    """Layers first to first + period * times, the same `period` layers over and over."""

    first: int
    period: int
    times: int


class LayerPlace(NamedTuple):
    """A place of a step that is there whatever the number of layers.

    Attributes:
        event: of the mark that begins it.
        block: its layer, counted from the first, or from the last if negative; None = of none.
        turn: how often the event had begun for this layer before.
    """

    event: str
    block: int | None
    turn: int


def find_repetition(config: Config, model: nn.Module) -> Repetition | None:
    """Returns how the layers of a model repeat; None where nothing would be gained by it.

    Args:
        config: that the model was built from.
        model: on the meta device, before it is placed.
    """
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or hasattr(model, "encoder_blocks"):
        return None
    labels = list(zip(mixer_labels(config), feedforward_labels(config)))
    if len(labels) != len(blocks) or len({id(block) for block in blocks}) < len(blocks):
        return None
    kinds = [(label, signature(block)) for label, block in zip(labels, blocks)]
    best = None
    for period in range(1, len(blocks) // (2 * ENDS + 2) + 1):
        first = len(blocks) - period
        while first > 0 and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        times = (len(blocks) - first) // period
        # Two shallow models must cost less than the deep one.
        planned = 2 * (len(blocks) - times * period) + (4 * ENDS + 1) * period
        if planned < len(blocks) and (best is None or planned < best[0]):
            best = planned, Repetition(len(blocks) - times * period, period, times)
    return None if best is None else best[1]


def signature(module: nn.Module) -> tuple:
    """Returns what two layers must have in common to cost the same."""
    parts: list[Any] = []
    for name, part in module.named_modules():
        shapes = [(leaf, p.shape, p.dtype, p.requires_grad) for leaf, p in _tensors_of(part)]
        plain = []
        for key, value in sorted(vars(part).items()):
            if not key.startswith("_") and key != OWN_NAME:
                said = repr(value)
                # An object that does not say what it holds is told by its class.
                plain.append((key, type(value) if " at 0x" in said else said))
        parts.append((name, type(part), tuple(shapes), tuple(plain)))
    return tuple(parts)


def _tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor is not None]


def keep_layers(model: nn.Module, repetition: Repetition, times: int) -> None:
    """Leaves so many repetitions of a model's layers in it."""
    blocks = getattr(model, "blocks")  # noqa: B009
    first = repetition.first + ENDS * repetition.period
    behind = first + (repetition.times - times) * repetition.period
    kept = [block for index, block in enumerate(blocks) if not first <= index < behind]
    setattr(model, "blocks", nn.ModuleList(kept))  # noqa: B010


def places(
    stretches: Sequence[PlannedStretch], repetition: Repetition, blocks: int
) -> dict[LayerPlace, PlannedStretch]:
    """Returns the stretches of a step by their place, without those of layers far inside.

    Args:
        stretches: of a step of a model with so many layers.
        repetition: of the deep model.
        blocks: number of layers that were planned.
    """
    head = repetition.first + ENDS * repetition.period
    tail = ENDS * repetition.period
    turns: Counter[tuple[str, int | None]] = Counter()
    found = {}
    for stretch in stretches:
        block = stretch.block
        if block is not None and block >= head:
            if block < blocks - tail:
                continue
            block -= blocks
        turn = turns[stretch.event, block]
        turns[stretch.event, block] += 1
        found[LayerPlace(stretch.event, block, turn)] = stretch
    return found


def extended(fewer: PlannedStretch, more: PlannedStretch, times: int) -> PlannedStretch:
    """Returns what is held with `times` repetitions more than in the shallower of two models.

    Args:
        fewer: of a model.
        more: of the model with one repetition more, at the same place.
        times: repetitions.
    """
    by_kind = {
        kind: max(0, size + times * (more.by_kind[kind] - size))
        for kind, size in fewer.by_kind.items()
    }
    host_bytes = fewer.host_bytes + times * (more.host_bytes - fewer.host_bytes)
    return PlannedStretch(fewer.event, fewer.block, by_kind, host_bytes)
