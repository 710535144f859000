"""Base class of engines: wrap, backward, clip, step, state.

Nothing else may differ between engines.

    engine = Single(mesh, optimiser, precision="float32", seed=0) model = engine.wrap(model) for
    each micro-batch: engine.backward(sum of local token losses / valid tokens of the whole step,
    last=...) norm = engine.clip(1.0) engine.step(learning_rate)

The loss convention makes the true gradient a plain sum over ranks and micro-batches, so that it
depends neither on how a sequence was cut nor on how valid tokens fall on ranks.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parallel.compilation import CompiledForward
from parallel.engines.gradients import clip_gradients
from parallel.engines.materialize import copy_into, named
from parallel.engines.optimizer_offload import OptimizerOffload
from parallel.mesh import Mesh

STORED = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.float32,
}  # what the optimiser sees
CHECKPOINTING = ("none", "full", "selective")
OFFLOAD = ("none", "optimizer")
SELECTIVE = (
    "engine.checkpointing=selective cannot keep what a compiled block computes"
    " (engine.compile=true); use engine.checkpointing=full, or engine.compile=false"
)

# (model, {name: tensor to optimise}) -> an optimiser whose state exists before its first step
BuildOptimiser = Callable[[nn.Module, Mapping[str, nn.Parameter]], Optimizer]


class Engine:
    """The verbs; an engine says how parameters are placed and how gradients meet.

    Attributes: model: what to call in forward, after `wrap`. parameters: {plain name: what the
        optimiser updates}, whole or sharded; tied parameters once. optimiser: torch's. drawn: a
        digest of the initial weights, whole; equal on every rank
        (parallel/engines/replica_checks.py).

    Args:
        mesh: this run's ranks.
        optimiser: builds the optimiser, see BuildOptimiser.
        precision: bfloat16 computes in it and keeps parameters, gradient sums and optimiser state
            in float32.
        seed: of the initial weights.
        checkpointing: none; full = keep only each block's input and compute the block again in
            backward; selective = keep the mean and mass of its attentions too, so that these are
            neither computed nor exchanged again.
        compile: compile each block.
        offload: what lies in the host's memory: none (or None), or optimizer (its state).

    Raises:
        ValueError: an unknown precision, checkpointing or offload, or selective checkpointing of
            compiled blocks.
    """

    model: nn.Module
    parameters: dict[str, nn.Parameter]
    optimiser: Optimizer
    drawn: str

    def __init__(
        self,
        mesh: Mesh,
        optimiser: BuildOptimiser,
        *,
        precision: str = "float32",
        seed: int = 0,
        checkpointing: str = "none",
        compile: bool = False,
        offload: str | None = None,
    ):
        if precision not in STORED:
            raise ValueError(
                f"precision={precision} is not offered; take one of {', '.join(STORED)}"
            )
        if checkpointing not in CHECKPOINTING:
            raise ValueError(
                f"engine.checkpointing={checkpointing} is not offered; take one of"
                f" {', '.join(CHECKPOINTING)}"
            )
        if checkpointing == "selective" and compile:
            raise ValueError(SELECTIVE)
        if (offload or "none") not in OFFLOAD:
            raise ValueError(unknown_offload(offload))
        self.mesh = mesh
        self.build_optimiser = optimiser
        self.precision = precision
        self.computed = getattr(torch, precision)  # what matrix products are taken in
        self.seed = seed
        self.how: dict[str, str] = {}
        self.checkpointing = checkpointing
        self.compile = compile
        self.compiled_blocks: list[CompiledForward] = []  # parallelize fills it
        self.offload = offload or "none"
        # What moves the optimiser's state; one that is set before `wrap` serves in place of ours.
        self.optimizer_offload: OptimizerOffload | None = None

    def wrap(self, model: nn.Module) -> nn.Module:
        """Place the parameters and build the optimiser; what is on the meta device gets its initial
        weights.

        Weights that exist already are kept and must be equal on every rank. Call the returned model
        in forward.
        """
        aliases = dict(named(model))
        self.model = self._place(model.to(STORED[self.precision]))
        self.parameters = self._stored()
        self.aliases = {name: first for name, first in aliases.items() if first in self.parameters}
        if self.offload == "optimizer":
            mover = self.optimizer_offload or OptimizerOffload(self.mesh.device)
            self.optimizer_offload = mover
            self.optimiser = mover.build(lambda: self.build_optimiser(self.model, self.parameters))
        else:
            self.optimiser = self.build_optimiser(self.model, self.parameters)
        return self.model

    def forward_precision(self) -> AbstractContextManager:
        """Stands around every forward. Nothing to do here: the placement itself casts."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Accumulate the gradient of `loss`; `last` (of the step's micro-batches) sums it over the
        ranks.

        Args:
            loss: [] sum of this rank's token losses in this micro-batch / valid tokens of the whole
                step, all ranks.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `backward`")

    def clip(self, max_norm: float | None = None) -> float:
        """Norm of the whole gradient, each parameter counted once; scaled down to `max_norm` unless
        that is None or 0."""
        return self.clip_unread(max_norm).item()

    def clip_unread(self, max_norm: float | None = None) -> Tensor:
        """The same, but the norm, [] float64, stays on the device, which nobody waits for."""
        return clip_gradients(list(self.parameters.values()), max_norm, self.mesh.device)

    def step(self, learning_rate: float) -> None:
        """Update the parameters and drop the gradients."""
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        if self.optimizer_offload is None:
            self.optimiser.step()
        else:
            self.optimizer_offload.step(self.optimiser)
        self.optimiser.zero_grad(set_to_none=True)

    def step_unless(self, unusable: Tensor, learning_rate: float) -> None:
        """As `step` where `unusable` [] is 0 and as `skip` where it is 1, which nobody waits to
        know: a fused optimiser of torch looks at it on the device.

        Raises:
            ValueError: the optimiser is not fused, and its tensors lie on another device than a
                CPU.
        """
        if not all(group.get("fused") for group in self.optimiser.param_groups):
            if unusable.device.type != "cpu":
                raise ValueError(
                    f"{type(self.optimiser).__name__} is not fused: it cannot leave a step out on"
                    " the device"
                )
            if unusable.item():
                self.skip()
            else:
                self.step(learning_rate)
            return
        # torch's fused optimisers look for these, which its gradient scaler sets too.
        self.optimiser.grad_scale = None  # type: ignore[attr-defined]
        self.optimiser.found_inf = unusable  # type: ignore[attr-defined]
        try:
            self.step(learning_rate)
        finally:
            del self.optimiser.grad_scale, self.optimiser.found_inf  # type: ignore[attr-defined]

    def skip(self) -> None:
        """Instead of `step`: drop the gradients; parameters and the optimiser's state stay bit for
        bit as they are."""
        self.optimiser.zero_grad(set_to_none=True)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """{"model": {name: tensor}, "optimizer": {"name.moment": tensor}}: names of the plain
        model, tensors only.

        The tensors are the live ones (sharded where the engine shards), so a loader may fill them
        in place; `load` must follow in any case. Settings of the optimiser come from the config and
        are not part of it. (torch's get_optimizer_state_dict is not used: on an optimiser that has
        not stepped yet it takes a step to create the state, and leaves the step count at 1.)
        """
        model = dict(self.model.state_dict())
        model.update(
            {name: self.parameters[first].detach() for name, first in self.aliases.items()}
        )
        return {"model": model, "optimizer": self.moments()}

    def moments(self) -> dict[str, Any]:
        """{"name.moment": tensor}: the optimiser's state, live, wherever it lies."""
        if self.optimizer_offload is not None:
            self.optimizer_offload.wait()
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimiser.state.get(parameter, {}).items()
        }

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `state` gave, here or on another engine or number of ranks. All ranks must
        call.

        Raises:
            ValueError: names or shapes that are not this model's.
        """
        own = self.state()
        same(own, state)
        for part, mine in own.items():
            for name, tensor in mine.items():
                copy_into(tensor, state[part][name])

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take weights by name and leave the optimiser as it is. All ranks must call.

        Args:
            weights: pairs of a name and a whole tensor, equal on every rank; each is dropped before
                the next is asked for. Of tied parameters the first name.
        """
        own = self.model.state_dict()
        for name, value in weights:
            copy_into(own[name], value)

    def _place(self, model: nn.Module) -> nn.Module:
        """Spread the parameters over the ranks, on the device, with their weights."""
        raise NotImplementedError(f"{type(self).__name__} must define `_place`")

    def _stored(self) -> dict[str, nn.Parameter]:
        """Returns the tensors that the optimiser updates."""
        return dict(self.model.named_parameters())


def unknown_offload(offload: str | None) -> str:
    """Says that an engine does not move that to the host."""
    return (
        f"engine.offload={offload} is not offered by this engine; take one of"
        f" {', '.join(OFFLOAD)}, or engine=deepspeed, which moves parameters too"
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers that are gathered, computed again and compiled one by one; a layer that is used
    twice stands once."""
    blocks: list[nn.Module] = []
    for name in ("encoder_blocks", "blocks"):
        stack = getattr(model, name, None)
        blocks += stack if isinstance(stack, nn.ModuleList) else []
    return list(dict.fromkeys(blocks))


def same(own: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a state whose names or shapes are not those of `own`; ValueError says which."""
    for part, mine in own.items():
        given = state[part]
        missing = sorted(set(mine) - set(given))
        strange = sorted(set(given) - set(mine))
        if missing or strange:
            raise ValueError(
                f"this {part} state is of another model: {len(missing)} names are missing"
                f" {missing[:3]}, {len(strange)} are unknown {strange[:3]}; load it with the config"
                " it was saved with"
            )
        for name, tensor in mine.items():
            if tensor.shape != given[name].shape:
                raise ValueError(
                    f"{name} has shape {[*given[name].shape]} in the state and {[*tensor.shape]}"
                    " here"
                )
