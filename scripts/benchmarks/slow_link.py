"""A communicator whose link is slowed on purpose, to see which communication is hidden.

What a rank sends takes bytes / bandwidth seconds, one send after the other in the order in which
they were started, whatever else the rank does. A message carries the moment at which it has left
its sender's link, and whoever waits for it sleeps until then.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.collectives import Communicator, Pending


class SlowPending(Pending):
    """A transfer that has arrived when its senders' links have let it go, and not before.

    Args:
        inner: the transfer.
        moments: the transfer of those moments.
    """

    def __init__(self, inner: Pending, moments: Pending):
        super().__init__(inner.works, inner.into, inner.kept, inner.devices)
        self.moments = moments

    def wait(self) -> list[Tensor]:
        """See Pending.wait."""
        arrived = super().wait()
        latest = max(float(moment) for moment in self.moments.wait())
        time.sleep(max(0.0, latest - time.perf_counter()))
        return arrived


class SlowCommunicator(Communicator):
    """A communicator whose sends take time by their bytes, between ranks of one machine.

    Attributes:
        seconds_per_byte: 0 = as fast as the machine is.
        sending_s: seconds that all sends took so far.
    """

    def __init__(self, group: Any):
        super().__init__(group)
        self.seconds_per_byte = 0.0
        self.sending_s = 0.0
        self._free = 0.0

    def ring_shift(self, tensors: Sequence[Tensor], name: str = "rotate") -> Pending:
        """See Communicator.ring_shift."""
        before = self.bytes_sent.get(name, 0)
        pending = super().ring_shift(tensors, name)
        moment = self._departure(self.bytes_sent.get(name, 0) - before, tensors[0])
        moments = super().ring_shift([moment], "moments")
        self.bytes_sent.pop("moments")
        return SlowPending(pending, moments)

    def start_all_to_all(
        self, parts: Sequence[Tensor], sizes: Sequence[int], name: str = "exchange"
    ) -> Pending:
        """See Communicator.start_all_to_all."""
        before = self.bytes_sent.get(name, 0)
        pending = super().start_all_to_all(parts, sizes, name)
        moment = self._departure(self.bytes_sent.get(name, 0) - before, parts[0])
        moments = super().start_all_to_all([moment] * self.size, [1] * self.size, "moments")
        self.bytes_sent.pop("moments")
        return SlowPending(pending, moments)

    def _departure(self, size: int, like: Tensor) -> Tensor:
        """Returns [1], when so many bytes have left that are sent now, behind those before."""
        seconds = size * self.seconds_per_byte
        self._free = max(self._free, time.perf_counter()) + seconds
        self.sending_s += seconds
        return torch.tensor([self._free], dtype=torch.float64, device=like.device)
