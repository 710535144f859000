"""What layers leave beside their output: losses of their own, and sums that tell of them. And
layers that know the step.

A layer leaves it at each forward pass with gradients, over the tokens at hand, in one of two ways:

* in `auxiliary`, {name: [B, T]}: losses that are linear in the tokens; for a layer that is passed
  through once in a forward pass of the model;
* in `aside`, an Aside, which adds up over however many times the layer is passed through.

So neither depends on micro-batches, accumulation or the cut. `settle(sums)` of the layer then gets
the statistics of all ranks and the whole step, may change the layer's state (the same on every
rank), and returns {name: figure} for the log. A layer that changes with the step has a method
`begin(step)`. The trainer calls the functions below.
"""

from collections.abc import Mapping

from torch import Tensor, nn


class AuxiliaryOutputs:
    """Sums over the tokens at hand, by name.

    Attributes: tokens: losses linear in the tokens; they count divided by the number of predicted
        tokens of the step, as the language
            loss does.
        rows: losses that the tokens of a packed row make up between them; they count divided by the
            number of rows of the step that hold tokens.
        statistics: [n], what tells of the layer.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}

    def add(
        self,
        *,
        tokens: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
        statistics: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add sums to those that are there."""
        for left, more in ((self.tokens, tokens), (self.rows, rows), (self.statistics, statistics)):
            for name, value in (more or {}).items():
                left[name] = left[name] + value if name in left else value


def on_step_begin(model: nn.Module, step: int) -> None:
    """Tell every layer which step comes next (the first is 1); what it does then is a function of
    that number alone."""
    for module in model.modules():
        told = getattr(module, "begin", None)
        if callable(told):
            told(step)


def reset_auxiliary(model: nn.Module) -> None:
    """Before a forward pass: drop what nobody took, above all what blocks left that were computed
    again in backward."""
    auxiliary_loss(model)
    statistics(model)


def auxiliary_loss(model: nn.Module, tokens: int = 1, rows: int = 1) -> dict[str, Tensor]:
    """The losses that layers left in the last forward pass; taken away, so never counted twice. To
    be summed over ranks.

    Args:
        tokens, rows: predicted tokens, and rows that hold tokens, of the whole step; by default
            what comes is sums.
    """
    sums: dict[str, Tensor] = {}
    for module in model.modules():
        aside = _aside(module)
        for left, count in (
            (getattr(module, "auxiliary", None), tokens),
            (aside.tokens, tokens),
            (aside.rows, rows),
        ):
            for name, losses in _taken(left).items():
                sums[name] = sums.get(name, 0) + losses.sum() / max(count, 1)
    return sums


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """{"module/name": sums} that layers left in the last forward pass; taken away. To be summed
    over all that is computed."""
    return {
        f"{place}/{name}": sums
        for place, module in model.named_modules()
        for name, sums in _taken(_aside(module).statistics).items()
    }


def on_step_end(model: nn.Module, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Hand layers the sums of the whole step; {"module/figure": value} of each layer, {"figure":
    value} their mean."""
    own: dict[str, dict[str, Tensor]] = {}
    for key, value in sums.items():
        place, slash, name = key.rpartition("/")
        if slash:
            own.setdefault(place, {})[name] = value
    found: dict[str, float] = {}
    every: dict[str, list[float]] = {}
    for place, mine in own.items():
        settled: dict[str, float] = model.get_submodule(place).settle(mine)  # type: ignore[operator]
        for name, value in settled.items():
            found[f"{place}/{name}"] = value
            every.setdefault(name, []).append(value)
    return {**{name: sum(values) / len(values) for name, values in every.items()}, **found}


def _aside(module: nn.Module) -> AuxiliaryOutputs:
    """The module's own, or an empty one."""
    aside = getattr(module, "aside", None)
    return aside if isinstance(aside, AuxiliaryOutputs) else AuxiliaryOutputs()


def _taken(left: object) -> dict[str, Tensor]:
    if not isinstance(left, dict):
        return {}
    taken = dict(left)
    left.clear()
    return taken
