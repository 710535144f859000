"""The hooks of a layer: what it may state about itself, and what it is told while a model trains.

A layer is a module that mixes tokens or transforms each of them. Everything that initialisation,
the optimiser, the cost counters, the memories and the trainer look for in one is an attribute of
`Layer`, with the value that holds where nothing is stated. A user's layer need not derive from it:
`hook` gives any nn.Module the same defaults.
"""

from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

Rule = Callable[[torch.Size, torch.Generator], Tensor]
"""Draws the initial value of a parameter, float32, from its shape."""


class AuxiliaryOutputs:
    """Sums over the tokens at hand, by name.

    Attributes:
        tokens: losses linear in the tokens; divided by the number of predicted tokens of the step,
            as the language loss is.
        rows: losses that the tokens of a packed row make up together; divided by the number of rows
            of the step that hold tokens.
        statistics: [n] of any meaning; `Layer.on_step_end` turns them into figures for the log.
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
        """Adds sums to those of earlier calls under the same names."""
        _add_to(self.tokens, tokens)
        _add_to(self.rows, rows)
        _add_to(self.statistics, statistics)


class Layer(nn.Module):
    """A module with the hooks of a layer; a subclass overrides those that it needs.

    The names below are reserved: a parameter or a submodule of a subclass has another name.
    """

    # Initial weights and the optimiser.

    init_std: float | None = None
    """Deviation of a whole model's initial matrices; None: models.init.INIT_STD."""

    weight_decay: Iterable[str] = ()
    """Names of parameters and modules that decay although torch's own layers do not hold them."""

    no_weight_decay: Iterable[str] = ()
    """Names of parameters and modules that never decay; counts more than `weight_decay`."""

    lr_scale: Mapping[str, float] = MappingProxyType({})
    """Factors of the learning rate, by the name of the parameter or the module that has one."""

    def init_rules(self) -> Mapping[str, Rule]:
        """Returns the rules of initial weights, by names that may reach into children."""
        return {}

    def reset_buffers(self) -> None:
        """Computes the buffers again on the current device, after a construction without values."""

    # Cost.

    active_share: float = 1.0
    """Share of the parameters that one token visits."""

    multiply_adds: int = 0
    """Multiply-adds of a token by matrices that are no weights of torch's layers."""

    positions_per_step: int | None = None
    """Positions that the weights see in a step, where that is not the number of tokens."""

    # Position and order of tokens.

    max_length: int | None = None
    """Longest document in tokens; None: no limit."""

    def causal_from(self) -> int:
        """Returns the position in a document from which on no later token is seen; 0: always."""
        return 0

    def sequential_parts(self, parent: nn.Module) -> Iterable[nn.Module]:
        """Returns the modules that run inside this layer's sequential steps, given its parent."""
        return ()

    # Graphs.

    reads_edges: bool = False
    """The whole model reads nodes with their edges: tokens of columns, feature and neighbours."""

    # Requests in several modalities.

    reads_requests: bool = False
    """The whole model reads words, patches and frames in columns (models/multimodal/columns.py)."""

    # A second stream of tokens (MicroBatch.source).

    reads_source: bool = False
    """The whole model reads, beside each row, a source with documents of the same numbers."""

    def source_parts(self) -> Iterable[nn.Module]:
        """Returns the modules whose keys or tokens are those of the source, never of the row."""
        return ()

    # Memories: each returns the reason why the layer has no exact form, or None where it has one.

    def carries_over(self) -> str | None:
        """States why a row cannot go on from what the rows before it left; None: it can."""
        return None

    def stays_local(self) -> str | None:
        """States why the layer cannot be restricted to its own segment; None: it can."""
        return None

    def runs_by_segment(self) -> str | None:
        """States why a document cannot be read segment by segment; None: it can."""
        return None

    # Decoding.

    def decodes(self) -> str | None:
        """States why rows have no exact continuation token by token; None: they have."""
        return None

    # Parallelism.

    def cut_in_time(self) -> str | None:
        """States why a row cannot be computed in pieces, one after another; None: it can."""
        return None

    shares_values: bool = False
    """The layer has `values(x, span, first) -> (y, first)` and is built into a ValueBlock."""

    sharded_over_experts: bool = False
    """All parameters are [E, ...], one expert after the other, and ranks may divide them."""

    # Training steps.

    auxiliary: dict[str, Tensor] | None = None
    """Losses [B, T] that the last forward pass left, of a layer that runs once in a pass."""

    auxiliary_sums: AuxiliaryOutputs | None = None
    """Losses and statistics summed over the passes of a layer that may run several times."""

    def on_step_begin(self, step: int) -> None:
        """Is told the step that comes next, from 1 on; its effect depends on that number alone."""

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Receives the statistics of the whole step, summed over ranks; returns figures to log.

        It may change the layer's state, in the same way on every rank.
        """
        return {}


_NAMES = (tuple, list, set, frozenset, str)

_VALUE_KINDS: dict[str, tuple[type, ...]] = {
    "init_std": (int, float),
    "weight_decay": _NAMES,
    "no_weight_decay": _NAMES,
    "lr_scale": (Mapping,),
    "active_share": (int, float),
    "multiply_adds": (int,),
    "positions_per_step": (int,),
    "max_length": (int,),
    "reads_edges": (bool,),
    "reads_requests": (bool,),
    "reads_source": (bool,),
    "shares_values": (bool,),
    "sharded_over_experts": (bool,),
    "auxiliary": (dict,),
    "auxiliary_sums": (AuxiliaryOutputs,),
}

_METHODS = {
    name
    for name, value in vars(Layer).items()
    if isinstance(value, FunctionType) and not name.startswith("_")
}

HOOKS = frozenset(_METHODS.union(_VALUE_KINDS))
"""Names of all hooks."""


def hook(owner: object, name: str) -> Any:
    """Returns a hook of a layer, or the default of `Layer` where the owner has none of that kind.

    Args:
        owner: a layer, any other nn.Module, or a position.
        name: one of HOOKS.
    """
    default = getattr(Layer, name)
    value = getattr(owner, name, None)
    # A user's layer may use the name for a thing of its own, such as a parameter: that is no hook.
    if name in _METHODS:
        is_hook = isinstance(value, MethodType | FunctionType)
        return value if is_hook else MethodType(default, owner)
    return value if isinstance(value, _VALUE_KINDS[name]) else default


def has_hook(owner: object, name: str) -> bool:
    """Tells a hook that the owner has itself from a default of `Layer`."""
    value = hook(owner, name)
    if isinstance(value, MethodType):
        return value.__func__ is not getattr(Layer, name)
    return value is not getattr(Layer, name)


def _add_to(sums: dict[str, Tensor], terms: Mapping[str, Tensor] | None) -> None:
    for name, value in (terms or {}).items():
        sums[name] = sums[name] + value if name in sums else value
