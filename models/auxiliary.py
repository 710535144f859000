"""Auxiliary losses and statistics of layers, and the two ends of a training step.

A forward pass with gradients leaves them in the layer, in one of two attributes (models/layer.py):

* `auxiliary`, {name: [B, T]}: losses that are linear in the tokens, of a layer that runs once in a
  forward pass of the model;
* `auxiliary_sums`: sums that grow with every pass of a layer that may run several times.

Neither depends on micro-batches, accumulation or sharding. The trainer calls the functions below.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from models.layer import AuxiliaryOutputs, hook


def on_step_begin(model: nn.Module, step: int) -> None:
    """Tells every layer the step that comes next; the first is 1."""
    for module in model.modules():
        hook(module, "on_step_begin")(step)


def reset_auxiliary(model: nn.Module) -> None:
    """Drops, before a forward pass, the losses and statistics that were never collected.

    Blocks that are computed again in backward leave theirs a second time.
    """
    auxiliary_loss(model)
    statistics(model)


def auxiliary_loss(model: nn.Module, tokens: int = 1, rows: int = 1) -> dict[str, Tensor]:
    """Takes the losses that layers left in the last forward pass; to be summed over ranks.

    Args:
        tokens, rows: predicted tokens, and rows that hold tokens, of the whole step; by default the
            result is plain sums.
    """
    losses: dict[str, Tensor] = {}
    for module in model.modules():
        sums = _auxiliary_sums(module)
        _add_means(losses, hook(module, "auxiliary"), tokens)
        _add_means(losses, sums.tokens, tokens)
        _add_means(losses, sums.rows, rows)
    return losses


def statistics(model: nn.Module) -> dict[str, Tensor]:
    """Takes {"module/name": sums} that layers left in the last forward pass.

    To be summed over micro-batches and ranks.
    """
    taken: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for name, sums in _take(_auxiliary_sums(module).statistics).items():
            taken[f"{path}/{name}"] = sums
    return taken


def on_step_end(model: nn.Module, sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Gives layers the statistics of the whole step and returns their figures for the log.

    Returns:
        {"module/figure": value} of each layer, and {"figure": value} for the mean over layers.
    """
    sums_by_layer: dict[str, dict[str, Tensor]] = {}
    for key, value in sums.items():
        path, slash, name = key.rpartition("/")
        if slash:
            sums_by_layer.setdefault(path, {})[name] = value
    figures: dict[str, float] = {}
    values_by_name: dict[str, list[float]] = {}
    for path, layer_sums in sums_by_layer.items():
        layer_figures: dict[str, float] = hook(model.get_submodule(path), "on_step_end")(layer_sums)
        for name, value in layer_figures.items():
            figures[f"{path}/{name}"] = value
            values_by_name.setdefault(name, []).append(value)
    means = {name: sum(values) / len(values) for name, values in values_by_name.items()}
    return {**means, **figures}


def _auxiliary_sums(module: nn.Module) -> AuxiliaryOutputs:
    """The module's own, or an empty one."""
    sums: AuxiliaryOutputs | None = hook(module, "auxiliary_sums")
    return AuxiliaryOutputs() if sums is None else sums


def _add_means(losses: dict[str, Tensor], terms: dict[str, Tensor] | None, count: int) -> None:
    """Takes the terms and adds their sums, divided by `count`, to the losses of the same names."""
    for name, values in _take(terms).items():
        losses[name] = losses.get(name, 0) + values.sum() / max(count, 1)


def _take(terms: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Empties the dict, so that nothing is counted twice."""
    if terms is None:
        return {}
    taken = dict(terms)
    terms.clear()
    return taken
