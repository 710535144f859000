"""Offloads the optimiser's state to host memory, from where an update fetches what it needs.

Parameters are updated one after another: the moments of one come to the device, are used and go
back before those of the next come. The device then holds weights and gradients, and moments of the
largest parameter only.

Source: Ren et al. 2021 (arXiv:2101.06840) for the idea. Theirs computes the update on the host and
keeps masters and gradients there too; ours computes it on the device, with the same kernels and so
the same bits as without offloading, and sends four times the size of a moment over the bus.
torch's CPUOffloadPolicy of FSDP2 moves parameters and gradients too and updates on the host.

Copies are queued on the stream that computes, as those of parallel/activation_offload.py: nobody
waits for them, and a step is longer by the time that they take.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from parallel.engines.materialize import local_tensor

SMALL = 1 << 16  # bytes; moments of fewer stay, for starting a copy takes longer than sending them
STATE_AT_HOME = (
    "engine.offload=optimizer, but the ranks compute in the host's memory already; use"
    " engine.offload=none"
)

HostRoom = Callable[[Tensor], Tensor]  # a tensor -> one like it in the host's memory

_allocate: ContextVar[HostRoom | None] = ContextVar("allocate", default=None)


def empty_moment(parameter: Tensor) -> Tensor:
    """Returns zeros like a parameter, sharded as it is: on its device, or in the host's memory
    where an OptimizerOffload builds the optimiser."""
    allocate = _allocate.get()
    if allocate is None or _is_small(parameter):
        return torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
    return allocate(parameter.detach()).zero_()


class OptimizerOffload:
    """Keeps moments on the host while parameters are not updated.

    An optimiser must update each parameter by its own gradient and state alone, as AdamW and Muon
    do. Moments that it makes with `empty_moment` never lie on the device all at once; others are
    moved when it has made them.

    Attributes:
        moved: bytes that left the device since the beginning.

    Args:
        device: that of this rank.
        allocate: makes room on the host; pinned by default, which torch rounds up to a power of 2.

    Raises:
        ValueError: the device is the host itself, and no room of another kind is given.
    """

    def __init__(self, device: torch.device, allocate: HostRoom | None = None):
        if allocate is None and device.type == "cpu":
            raise ValueError(STATE_AT_HOME)
        self.device = device
        self.allocate = allocate or _pinned
        self.moved = 0
        self.rooms: dict[tuple[int, str], Tensor] = {}  # by (id of the parameter, key of its state)

    def build(self, build: Callable[[], Optimizer]) -> Optimizer:
        """Returns the optimiser that `build` makes, its moments being on the host."""
        made: list[Tensor] = []

        def allocate(parameter: Tensor) -> Tensor:
            made.append(self.allocate(parameter))
            return made[-1]

        before = _allocate.set(allocate)
        try:
            optimiser = build()
        finally:
            _allocate.reset(before)
        rooms = {id(room) for room in made}
        for parameter, state in optimiser.state.items():
            for key, value in state.items():
                if id(value) in rooms:
                    self.rooms[id(parameter), key] = value
            self._send(optimiser, parameter)
        return optimiser

    def step(self, optimiser: Optimizer) -> None:
        """Updates every parameter that has a gradient, as `optimiser.step()` does."""
        groups = optimiser.param_groups
        members = [group["params"] for group in groups]
        for group in groups:
            group["params"] = []
        try:
            for group, parameters in zip(groups, members, strict=True):
                for parameter in parameters:
                    if parameter.grad is not None:
                        group["params"] = [parameter]
                        with self._fetched(optimiser, parameter):
                            optimiser.step()
                group["params"] = []
        finally:
            for group, parameters in zip(groups, members, strict=True):
                group["params"] = parameters

    def wait(self) -> None:
        """Waits until what was sent is there to be read."""
        torch.get_device_module(self.device).synchronize()

    @contextmanager
    def _fetched(self, optimiser: Optimizer, parameter: Tensor) -> Iterator[None]:
        """Has the state of one parameter on the device meanwhile."""
        state = optimiser.state[parameter]
        for key in state:
            room = self.rooms.get((id(parameter), key))
            if room is not None:
                state[key] = self._to_device(room)
        try:
            yield
        finally:
            self._send(optimiser, parameter)

    def _send(self, optimiser: Optimizer, parameter: Tensor) -> None:
        """Moves the state of one parameter to its rooms, which are made where there are none."""
        state = optimiser.state[parameter]
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.device != self.device or _is_small(value):
                continue
            room = self.rooms.get((id(parameter), key))
            if value is room:
                continue
            if room is None:
                room = self.rooms[id(parameter), key] = self.allocate(value)
            self._to_host(value, room)
            self.moved += local_tensor(value).nbytes
            state[key] = room

    def _to_device(self, room: Tensor) -> Tensor:
        return torch.empty_like(room, device=self.device).copy_(room, non_blocking=True)

    def _to_host(self, value: Tensor, room: Tensor) -> None:
        room.copy_(value, non_blocking=True)


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=True)


def _is_small(tensor: Tensor) -> bool:
    return local_tensor(tensor).nbytes < SMALL
