"""What layers leave beside their output: losses of their own, and sums that tell of them. And layers that know the step.

A layer that has such a loss leaves it at each forward pass with gradients, over the tokens at hand:

* in `auxiliary`, {name: [B, T]}: linear in the tokens; it counts divided by the number of predicted tokens of the step, as
  the language loss does;
* in `auxiliary_rows`, {name: [B, T]}: the tokens of a packed row make up the row's loss between them; it counts divided by
  the number of rows of the step that hold tokens.

So neither depends on micro-batches, accumulation or the cut. What tells of a layer it leaves in `statistics`, {name: [n]},
sums over the tokens at hand; `settle(sums)` of the layer then gets those of all ranks and the whole step, may change the
layer's state (the same on every rank), and returns {name: figure} for the log. A layer that changes with the step has a
method `begin(step)`. The trainer calls the functions below.
"""

from collections.abc import Mapping

from torch import Tensor, nn


def begin(model: nn.Module, step: int) -> None:
    """Tell every layer which step comes next (the first is 1); what it does then is a function of that number alone."""
    for module in model.modules():
        told = getattr(module, "begin", None)
        if callable(told):
            told(step)


def auxiliary(model: nn.Module, tokens: int = 1, rows: int = 1) -> dict[str, Tensor]:
    """What layers left in their last forward pass; taken away, so never counted twice. To be summed over ranks.

    Args:
        tokens, rows: predicted tokens, and rows that hold tokens, of the whole step; by default what comes is sums.
    """
    sums: dict[str, Tensor] = {}
    for module in model.modules():
        for attribute, count in (("auxiliary", tokens), ("auxiliary_rows", rows)):
            for name, losses in _taken(module, attribute).items():
                sums[name] = sums.get(name, 0) + losses.sum() / max(count, 1)
    return sums


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """{"module/name": sums} that layers left in their last forward pass; taken away. To be summed over all that is computed."""
    return {
        f"{place}/{name}": sums
        for place, module in model.named_modules()
        for name, sums in _taken(module, "statistics").items()
    }


def settle(model: nn.Module, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Hand layers the sums of the whole step; {"module/figure": value} of each layer, {"figure": value} their mean."""
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


def _taken(module: nn.Module, attribute: str) -> dict[str, Tensor]:
    left = getattr(module, attribute, None)
    if not isinstance(left, dict):
        return {}
    taken = dict(left)
    left.clear()
    return taken
