"""Fits the sizes of a model to those of full attention: match=parameters or match=flops.

The reference is `model=full` under the same settings, without memory. The width is fitted first, to
a multiple that kernels like; the feed-forward width takes up the rest, unless it was set by hand.
Layers, heads and everything else stay as they are.
"""

import math
from collections.abc import Callable, Sequence

import torch

from models.architectures.decoder import Decoder
from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.span import Span
from trainer.config import build_model
from trainer.config.compose import compose
from trainer.config.node_checks import parameters
from trainer.config.schema import Config, ModelConfig
from trainer.errors import UserError
from trainer.objectives.stream import vocabulary_of

# Features of a head: a multiple of 8 is what kernels like, a multiple of 2 what rotations need.
WIDE_MULTIPLE = 8
NARROW_MULTIPLE = 2
WIDE_HEAD = 64  # from this head width on, steps of 8 features a head are fine enough
TOLERANCE = 0.1  # further from the reference than this is refused
WIDTH_STEPS = 8  # of the search; cost grows as the square of the width, so it ends sooner
LAYER_KEYS = (
    "mixer",
    "memory",
    "model.pattern",
    "model.mixers",
    "model.feedforward",
    "model.feedforwards",
    "model.feedforward_pattern",
    "model._target_",
)
LAYER_FIELDS = (
    "target",
    "pattern",
    "mixers",
    "feedforward",
    "feedforward_pattern",
    "feedforwards",
)
UNITS = {"parameters": "parameters", "flops": "FLOPs a token"}
Cost = Callable[[Config], float]


def match_sizes(config: Config, words: Sequence[str]) -> tuple[Config, str]:
    """Returns the config with its widths fitted to the reference, and a line about the result.

    Args:
        config: a config with match=parameters or match=flops; with match=none it is returned
            unchanged, with an empty line.
        words: the settings that it was composed of; the reference is composed of the same.

    Raises:
        UserError: a model cannot be built, or no width comes within 10 % of the reference.
    """
    if config.match == "none":
        return config, ""
    cost = _cost_function(config.match, vocabulary_of(config))
    full = reference(config, words)
    target_cost = cost(full)
    fitted = _fit_width(config, target_cost, cost, _width_step(full))
    if not _sets_ffn(words):
        fitted = _fit_ffn(fitted, target_cost, cost)
    fitted_cost = cost(fitted)
    deviation = fitted_cost / target_cost - 1
    unit = UNITS[config.match]
    if abs(deviation) > TOLERANCE:
        raise UserError(
            f"match={config.match}: no width comes near the {target_cost:,.0f} {unit} of model=full"
            f" at model.width={full.model.width}; model.width={fitted.model.width} is"
            f" {deviation:+.1%} off; use another model.width or model.layers, or match=none"
        )
    sizes = f"model.width={fitted.model.width}"
    if fitted.model.ffn != config.model.ffn:
        sizes += f", model.ffn={fitted.model.ffn}"
    report = (
        f"match={config.match}: set {sizes}; {fitted_cost:,.0f} {unit}, {deviation:+.2%} of the"
        f" {target_cost:,.0f} of model=full at model.width={full.model.width}"
    )
    return fitted, report


def reference(config: Config, words: Sequence[str]) -> Config:
    """Returns full attention in every layer, in the sizes that the settings name, without memory.

    Raises:
        UserError: the settings do not compose with model=full.
    """
    sizes_only = [word for word in words if not _sets_layers(word) and not _is_own(word)]
    composed = compose([*sizes_only, "model=full"])
    full = compose(["model=full"])
    if composed.config is None or full.config is None:
        headline = f"match={config.match}: model=full cannot be composed"
        raise UserError("\n".join([headline, *composed.faults]))
    # A recipe among the settings may set layers and a memory as well, so these come from model=full
    # alone.
    layers = {name: getattr(full.config.model, name) for name in LAYER_FIELDS}
    model = composed.config.model.model_copy(update=layers)
    return composed.config.model_copy(
        update={"model": model, "mixer": None, "memory": full.config.memory}
    )


def _sets_layers(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    if key == "model" or key in LAYER_KEYS:
        return True
    return any(key.startswith(f"{layer_key}.") for layer_key in LAYER_KEYS)


def _is_own(word: str) -> bool:
    """Tells whether a setting is of the model's own class, and unknown to that of model=full."""
    key = word.lstrip("+~").partition("=")[0]
    if not key.startswith("model."):
        return False
    name = key.split(".")[1]
    return name not in ModelConfig.model_fields and name not in parameters(Decoder)


def _sets_ffn(words: Sequence[str]) -> bool:
    return any(word.lstrip("+").startswith("model.ffn=") for word in words)


def _cost_function(match: str, vocabulary: int) -> Cost:
    """Returns the function whose values are to be equal.

    It counts all parameters, or the training FLOPs per token of one document as long as a row.
    """

    def cost(config: Config) -> float:
        with torch.device("meta"):
            model = build_model.build_model(config, vocabulary)
        if match == "parameters":
            return count_parameters(model).total
        length = config.context_length
        return count_flops(model).training(Span.line(1, length)) / length

    return cost


def _resized(config: Config, **sizes: int) -> Config:
    model = config.model.model_copy(update=sizes)
    return config.model_copy(update={"model": model})


def _width_step(config: Config) -> int:
    """Returns the number that the widths to choose from are multiples of."""
    heads = config.model.heads
    if config.model.width // heads >= WIDE_HEAD:
        return heads * WIDE_MULTIPLE
    return heads * NARROW_MULTIPLE


def _fit_width(config: Config, target_cost: float, cost: Cost, step: int) -> Config:
    """Returns the config at the multiple of `step` whose cost is nearest to the target."""
    costs: dict[int, float] = {}

    def cost_at(width: int) -> float:
        # Each cost builds a model, so none is computed twice.
        if width not in costs:
            costs[width] = cost(_resized(config, width=width))
        return costs[width]

    width = max(step, round(config.model.width / step) * step)
    for _ in range(WIDTH_STEPS):
        scale = math.sqrt(target_cost / cost_at(width))
        next_width = max(step, round(width * scale / step) * step)
        if next_width in costs:
            break
        width = next_width
    nearest = min(costs, key=lambda tried: abs(costs[tried] - target_cost))
    for neighbour in (nearest - step, nearest + step):
        if neighbour > 0:
            cost_at(neighbour)

    def distance(tried: int) -> tuple[float, bool]:
        # Of two equally near widths the one that the user set.
        return abs(costs[tried] - target_cost), tried != config.model.width

    return _resized(config, width=min(costs, key=distance))


def _fit_ffn(config: Config, target_cost: float, cost: Cost) -> Config:
    """Returns the config with the feed-forward width, in eights, that takes up the difference.

    The cost is linear in that width, so one division finds it.
    """
    present_cost = cost(config)
    if present_cost == target_cost:
        return config
    ffn = build_model.ffn_width(config)
    slope = (cost(_resized(config, ffn=ffn + 8)) - present_cost) / 8
    if slope <= 0:  # no layer takes it
        return config
    wanted_ffn = ffn + (target_cost - present_cost) / slope
    resized = _resized(config, ffn=max(8, round(wanted_ffn / 8) * 8))
    # The rounded width may be further off than the one that the config has.
    return min(config, resized, key=lambda candidate: abs(cost(candidate) - target_cost))
