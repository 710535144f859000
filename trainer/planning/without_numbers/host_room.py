"""Activations and moments in the host's memory, for a plan: their bytes without their numbers."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from parallel.activation_offload import SMALL, ActivationOffload, HostCopy, OffloadedTensor
from parallel.engines.materialize import local_tensor
from parallel.engines.optimizer_offload import OptimizerOffload
from trainer.planning.live_memory import LiveMemory
from trainer.planning.step_costs import StepCosts
from trainer.planning.watched_step import HOST

UNIT = torch.bfloat16  # rooms are floating-point tensors, which are fake
UNIT_BYTES = 2


class PlannedOffload(ActivationOffload):
    """Sends what blocks save to a host that is not there.

    It decides as ActivationOffload does. Tensors without numbers have no address and are told apart
    by their storage, and what comes back is made anew with the shape that it had.

    Args:
        device: that of the ranks.
        live: counts the bytes.
        costs: counts the copies.
        pinned: whether rooms are rounded up to a power of 2, as torch's pinned memory is.
    """

    def __init__(self, device: torch.device, live: LiveMemory, costs: StepCosts, *, pinned: bool):
        super().__init__(device, self._room)
        self.live = live
        self.costs = costs
        self.pinned = pinned

    def _room(self, size: int) -> Tensor:
        """Returns [n]: a room of at least `size` bytes."""
        if self.pinned:
            size = 1 << (size - 1).bit_length()
        with self.live.labelled(HOST):
            return torch.empty(-(-size // UNIT_BYTES), dtype=UNIT)

    @torch.no_grad()
    def send(self, tensor: Tensor, block: nn.Module) -> Tensor | OffloadedTensor:
        """See ActivationOffload.send."""
        itself = tensor if tensor.is_leaf else tensor.detach()
        own = type(tensor) is Tensor or type(tensor) is FakeTensor
        if not own or isinstance(tensor, nn.Parameter) or tensor.layout != torch.strided:
            return itself
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALL:
            return itself
        key = id(storage), tensor._version
        copy = self.copies.get(key)
        if copy is None or copy.source() is not storage:
            if storage._cdata in _held(block):
                return itself
            copy = self.copies[key] = PlannedCopy(tensor, self)
            self.sent += storage.nbytes()
        return OffloadedTensor(
            copy, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset())
        )

    @torch.no_grad()
    def fetch(self, sent: Tensor | OffloadedTensor) -> Tensor:
        """See ActivationOffload.fetch."""
        if isinstance(sent, Tensor):
            return sent
        assert isinstance(sent.copy, PlannedCopy)
        there = sent.copy.returned()
        if there.dtype != sent.dtype:
            there = there.view(sent.dtype)
        return there.as_strided(sent.shape, sent.stride, sent.offset)


class PlannedCopy(HostCopy):
    """The bytes of one storage on the host; see HostCopy."""

    def __init__(self, tensor: Tensor, offload: PlannedOffload):
        storage = tensor.untyped_storage()
        self.source = weakref.ref(storage)
        self.offload = offload
        self.size = storage.nbytes()
        self.dtype = tensor.dtype
        # Addresses are worked out for real and must come back as they are.
        self.numbers = None if isinstance(tensor, FakeTensor) else tensor.detach()
        self.host = offload.allocate(self.size)
        self.there: Any = None
        offload.costs.note_host_copy(self.size)

    def returned(self) -> Tensor:
        """Returns a tensor over the whole storage, the same one as long as somebody holds it."""
        if self.numbers is not None:
            flat = self.numbers
            return flat.as_strided((self.size // flat.element_size(),), (1,), 0)
        there = None if self.there is None else self.there()
        if there is None:
            there = torch.empty(self.size // self.dtype.itemsize, dtype=self.dtype)
            self.there = weakref.ref(there)
            self.offload.costs.note_host_copy(self.size)
        return there


class PlannedOptimizerOffload(OptimizerOffload):
    """Keeps moments on a host that is not there; see OptimizerOffload.

    Args:
        device: that of the ranks.
        live: counts the bytes.
        costs: counts the copies.
        pinned: whether rooms are rounded up to a power of 2, as torch's pinned memory is.
    """

    def __init__(self, device: torch.device, live: LiveMemory, costs: StepCosts, *, pinned: bool):
        super().__init__(device, self._room)
        self.live = live
        self.costs = costs
        self.pinned = pinned

    def _room(self, like: Tensor) -> Tensor:
        """Returns a tensor like another, said to be on the host."""
        with self.live.labelled(HOST):
            room = torch.empty_like(like)
        number = self.live.number_of(room)
        if self.pinned and number is not None:
            allocation = self.live.history[number]
            allocation.size = 1 << (allocation.size - 1).bit_length()
        return room

    def _to_device(self, room: Tensor) -> Tensor:
        self.costs.note_host_copy(local_tensor(room).nbytes)
        return torch.empty_like(room)

    def _to_host(self, value: Tensor, room: Tensor) -> None:
        self.costs.note_host_copy(local_tensor(value).nbytes)


def _held(block: nn.Module) -> set[int]:
    """Returns the storages of the parameters and buffers of a block."""
    tensors = (*block.parameters(), *block.buffers())
    return {local_tensor(tensor).untyped_storage()._cdata for tensor in tensors}
