"""Where the agents of several machines meet, and what each of them is."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, as one of them sees it.

    Attributes:
        many: machines, each with as many ranks. rank: which of them this is; 0 holds the meeting.
        endpoint: HOST:PORT of machine 0. address: by which the others reach this one; None = its name.
        name: of the run, the same on all. timeout_s: longest wait for the others, also for one that comes back.
    """

    many: int
    rank: int
    endpoint: str
    address: str | None
    name: str
    timeout_s: float

    @property
    def near(self) -> bool:
        """Whether all of them are this machine (loopback addresses)."""
        return self.endpoint.startswith(("127.", "localhost:"))

    def meeting(self) -> dict[str, Any]:
        """What torchrun's agent is told of them."""
        return {
            "min_nodes": self.many,
            "max_nodes": self.many,
            "run_id": self.name,
            "rdzv_backend": "c10d",
            "rdzv_endpoint": self.endpoint,
            "rdzv_configs": {"is_host": str(self.rank == 0).lower(), "join_timeout": self.timeout_s},
            "local_addr": self.address,
        }


def alone(name: str) -> Nodes:
    """One machine that meets itself."""
    return Nodes(1, 0, "127.0.0.1:0", "127.0.0.1", name, 600)
