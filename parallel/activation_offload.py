"""Offloads activations to host memory until backward needs them.

What autograd saves inside a block is copied there when it is saved, and comes back when backward
asks for it. What a block computes again is not saved and so does not travel: with full
checkpointing the blocks' inputs go; with selective the kept means and masses of its attentions
(models/primitives/attention_tape.py) too, though autograd does not know of them. What is saved
outside of the blocks (embedding, losses) stays.

Source: Rhu et al. 2016 (arXiv:1602.08124) for the idea. Theirs moves the inputs of layers with a
stream and a schedule of their own; ours whatever is saved, through
torch.autograd.graph.saved_tensors_hooks.

Copies are queued on the stream that computes: nothing can be read too early or used again too soon,
and a step is longer by the time that they take. Saving all of a wide block takes a bus longer than
computing it, so that a second stream would hide little and, unless it is held back, give no memory
back; with full checkpointing there is little to hide.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from models.primitives.attention_tape import AttentionTape, TapeEntries
from parallel.engines.materialize import local_tensor

SMALL = 1024  # bytes; a storage of fewer stays
AT_HOME = (
    "engine.offload_activations=true, but the ranks compute in the host's memory already; use"
    " engine.offload_activations=false"
)

Allocate = Callable[[int], Tensor]  # bytes -> [bytes] uint8 in the host's memory


class HostCopy:
    """The bytes of one storage, on the host; they come back once for all who need them at the same
    time."""

    def __init__(self, tensor: Tensor, allocate: Allocate):
        self.source = weakref.ref(tensor.untyped_storage())
        self.device = tensor.device
        flat = torch.empty(0, dtype=torch.uint8, device=self.device).set_(tensor.untyped_storage())
        self.host = allocate(len(flat)).copy_(flat, non_blocking=True)
        self.back: weakref.ref | None = None

    def storage(self) -> Any:
        """On the device; the same one as long as somebody holds it."""
        there = self.back() if self.back is not None else None
        if there is None:
            there = torch.empty(len(self.host), dtype=torch.uint8, device=self.device)
            there = there.copy_(self.host, non_blocking=True).untyped_storage()
            self.back = weakref.ref(there)
        return there


class OffloadedTensor(NamedTuple):
    """A tensor whose storage is on the host: where in the storage it lies."""

    copy: HostCopy
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class ActivationOffload:
    """Sends to the host what blocks save for backward, and fetches it from there.

    A storage travels whole and once, however many views of it are saved, by however many blocks.
    Parameters and buffers stay, also those that are gathered only while the block computes; so does
    what lies elsewhere than on `device`.

    Attributes:
        sent: bytes that left the device since the beginning.

    Args:
        device: that of this rank.
        allocate: makes room on the host; pinned by default, which torch rounds up to a power of 2
            and uses again.

    Raises:
        ValueError: the device is the host itself, and no room of another kind is given.
    """

    def __init__(self, device: torch.device, allocate: Allocate | None = None):
        if allocate is None and device.type == "cpu":
            raise ValueError(AT_HOME)
        self.device = device
        self.allocate = allocate or _pinned
        self.sent = 0
        self.copies: weakref.WeakValueDictionary[tuple[int, int], HostCopy] = (
            weakref.WeakValueDictionary()
        )

    def around(self, block: nn.Module) -> Callable[..., Any]:
        """The forward of `block`, everything that it saves being sent."""
        forward = block.forward

        def saving(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(lambda tensor: self.send(tensor, block), self.fetch):
                return forward(*args, **kwargs)

        return saving

    @torch.no_grad()
    def send(self, tensor: Tensor, block: nn.Module) -> Tensor | OffloadedTensor:
        """Returns what replaces `tensor` until it is fetched; the tensor itself where it stays."""
        # Detached, because a function that saves its own result would keep itself alive for ever.
        itself = tensor if tensor.is_leaf else tensor.detach()
        if (
            type(tensor) is not Tensor
            or tensor.device != self.device
            or tensor.layout != torch.strided
        ):
            return itself
        if tensor.untyped_storage().nbytes() < SMALL:
            return itself
        tensor = tensor.resolve_conj().resolve_neg()  # these are marks on a view, not bytes
        storage = tensor.untyped_storage()
        key = id(storage), tensor._version  # written to since, it is something else
        copy = self.copies.get(key)
        if copy is None or copy.source() is not storage:
            if storage.data_ptr() in _held(block):
                return itself
            copy = self.copies[key] = HostCopy(tensor, self.allocate)
            self.sent += storage.nbytes()
        return OffloadedTensor(
            copy, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset())
        )

    @torch.no_grad()
    def fetch(self, sent: Tensor | OffloadedTensor) -> Tensor:
        """Returns the tensor that was sent, with the same shape, strides and bits."""
        if isinstance(sent, Tensor):
            return sent
        blank = torch.empty(0, dtype=sent.dtype, device=self.device)
        return blank.set_(sent.copy.storage(), sent.offset, sent.shape, sent.stride)

    def tapes(
        self, block: nn.Module, pair: tuple[AttentionTape, AttentionTape]
    ) -> tuple["OffloadedBlock", "OffloadedBlock"]:
        """Around (what records, what plays back) of one pass through `block`."""
        sent: list[list[tuple[Tensor | OffloadedTensor, ...]]] = []
        record, play = pair
        return OffloadedBlock(self, block, record, sent), OffloadedBlock(self, block, play, sent)


class OffloadedBlock:
    """Stands around a tape: what it recorded is on the host until it is played back, and afterwards
    again."""

    def __init__(
        self,
        offload: ActivationOffload,
        block: nn.Module,
        tape: AttentionTape,
        sent: list[list[tuple[Tensor | OffloadedTensor, ...]]],
    ):
        self.offload = offload
        self.block = block
        self.tape = tape
        self.sent = sent

    def __enter__(self) -> None:
        if self.tape.plays:
            for there, sent in zip(self.tape.tapes, self.sent, strict=True):
                there[:] = [tuple(map(self.offload.fetch, results)) for results in sent]
        self.tape.__enter__()

    def __exit__(self, *error: object) -> None:
        self.tape.__exit__(*error)
        if not self.tape.plays:
            self.sent[:] = map(self._send, self.tape.tapes)
        for there in self.tape.tapes:
            there.clear()

    def _send(self, tape: Sequence[TapeEntries]) -> list[tuple[Tensor | OffloadedTensor, ...]]:
        return [
            tuple(self.offload.send(tensor, self.block) for tensor in results) for results in tape
        ]


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _held(block: nn.Module) -> set[int]:
    """Returns the addresses of the parameters and buffers of `block`.

    A gathered parameter is among them only while the block computes.
    """
    tensors: Iterable[Tensor] = (*block.parameters(), *block.buffers())
    return {local_tensor(tensor).untyped_storage().data_ptr() for tensor in tensors}
