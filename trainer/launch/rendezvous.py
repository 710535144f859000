"""Rendezvous of the launchers of a run: machines keep their numbers, and nothing is unpickled.

torch's own handler numbers machines as they come, keeps its state as a pickle in a store that
anybody who reaches a port may write to, and opens that port on every network. Here machine 0 holds
a store that listens at one address (on a single machine the loopback address), and all that is
written there is JSON and plain bytes.

A round is one start of the ranks. Each machine registers in the round after the last complete one;
machine 0 declares a round complete when all have registered. A machine that was lost and comes back
registers in the next round, and the others see that somebody waits there and stop their ranks to
join.
"""

import json
import os
import platform
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from trainer.launch.nodes import Nodes, NoMeeting, listener

BACKEND = "longspan"
ROUND = "LONGSPAN_ROUND"  # in the environment of the ranks: which round of the meeting started them
POLL_S = 0.05
BEAT_S = 1.0  # between two signs of life of a launcher
SILENCE_S = 4.0  # without one, a launcher that had the same number is gone


class Rendezvous(RendezvousHandler):
    """Brings the launchers of all machines together, once for each start of the ranks.

    Args:
        nodes: the machines.
        say: takes the one line about who is there.
    """

    def __init__(self, nodes: Nodes, say: Callable[[str], None]):
        self.nodes = nodes
        self.say = say
        self.token = secrets.token_hex(8)
        self.round = -1
        self.store: Any = None
        self.address = ""
        self.port = 0
        self.beats = 0
        self.last_beat = 0.0

    def get_backend(self) -> str:
        return BACKEND

    def get_run_id(self) -> str:
        return self.nodes.name

    @property
    def use_agent_store(self) -> bool:
        """The ranks meet at the store of the launcher of machine 0, under keys of their round."""
        return True

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nothing to close: a machine that gave up is missed by the others in their next round."""

    def shutdown(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meets the other machines; returns when all have come.

        Raises:
            NoMeeting: they did not come in time, do not agree, or machine 0 is gone.
        """
        first = self.store is None
        try:
            if first:
                self._open()
            number = self._next_round()
            if first:
                self._refuse_double(number)
            members = self._join(number)
        except (dist.DistError, ConnectionError) as error:
            raise self._lost() from error
        self.round = number
        os.environ[ROUND] = str(number)
        if self.nodes.many > 1:
            self._introduce(members)
        return RendezvousInfo(
            dist.PrefixStore(f"launchers_{number}", self.store),  # pyright: ignore[reportPrivateImportUsage]
            self.nodes.rank,
            self.nodes.many,
            RendezvousStoreInfo(self.address, self.port),
        )

    def num_nodes_waiting(self) -> int:
        """Returns the number of machines that wait in the next round.

        The agent asks all the time, so each call is a sign of life as well.

        Raises:
            NoMeeting: machine 0 is gone.
        """
        if self.nodes.many == 1:
            return 0
        try:
            self._beat()
            return self.store.add(f"{self.round + 1}/waiting", 0)
        except (dist.DistError, ConnectionError) as error:
            raise self._lost() from error

    def _open(self) -> None:
        """Opens the store of the meeting on machine 0, or connects to it."""
        limit = timedelta(seconds=self.nodes.timeout_s)
        if self.nodes.rank == 0:
            address = self.nodes.listening_address()
            try:
                server = listener(address, self.nodes.port)
            except OSError as error:
                raise NoMeeting(
                    f"launch.rdzv_endpoint={self.nodes.endpoint}: machine 0 cannot listen at"
                    f" {address} ({error.strerror}); give an address of this machine and a free"
                    " port"
                ) from error
            self.store = store_of(server, limit)
            self.address = address
            self.port = self.store.port
            return
        self.address = self.nodes.host
        self.port = self.nodes.port
        self._reach()
        self.store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            self.address, self.port, is_master=False, timeout=limit, wait_for_workers=False
        )

    def _reach(self) -> None:
        """Waits until machine 0 listens; a store would wait as well, but deaf to signals."""
        end = time.monotonic() + self.nodes.timeout_s
        while True:
            try:
                socket.create_connection((self.address, self.port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > end:
                    raise NoMeeting(
                        f"launch.rdzv_endpoint={self.nodes.endpoint}: machine 0 did not answer"
                        f" within {self.nodes.timeout_s:.0f} s ({error}); start it with"
                        " launch.node_rank=0"
                    ) from error
            time.sleep(0.5)

    def _next_round(self) -> int:
        """Returns the first incomplete round after the last that this machine was in."""
        number = self.round + 1
        while self.store.check([f"{number}/complete"]):
            number += 1
        return number

    def _refuse_double(self, number: int) -> None:
        """Refuses a second machine of the same number: the two would throw each other out.

        Raises:
            NoMeeting: the launcher that has this machine's number is alive.
        """
        holder = self._holder(number) or self._holder(number - 1)
        if holder is None or self.nodes.many == 1:
            return
        before = self._beats_of(holder)
        end = time.monotonic() + SILENCE_S
        while time.monotonic() < end:
            time.sleep(POLL_S)
            if self._beats_of(holder) != before:
                raise self._double(holder)

    def _holder(self, number: int) -> dict[str, Any] | None:
        """Returns the launcher that registered under this machine's number in a round."""
        key = f"{number}/node/{self.nodes.rank}"
        return json.loads(self.store.get(key)) if number >= 0 and self.store.check([key]) else None

    def _beats_of(self, holder: dict[str, Any]) -> int:
        return self.store.add(f"beats/{holder['token']}", 0)

    def _double(self, holder: dict[str, Any]) -> NoMeeting:
        return NoMeeting(
            f"launch.node_rank={self.nodes.rank}: {holder['host']} is machine {self.nodes.rank} of"
            f" this run already; give each of the {self.nodes.many} machines a number of its own"
        )

    def _join(self, number: int) -> list[dict[str, Any]]:
        """Registers, waits until all machines have, and returns them in order."""
        mine = {"token": self.token, "host": platform.node(), "machines": self.nodes.many}
        self.store.set(f"{number}/node/{self.nodes.rank}", json.dumps(mine))
        self.store.add(f"{number}/waiting", 1)
        keys = [f"{number}/node/{rank}" for rank in range(self.nodes.many)]
        end = time.monotonic() + self.nodes.timeout_s
        while not self.store.check([f"{number}/complete"]):
            if self.nodes.rank == 0 and self.store.check(keys):
                members = [json.loads(self.store.get(key)) for key in keys]
                self.store.set(f"{number}/complete", json.dumps(members))
                break
            if time.monotonic() > end:
                raise self._missing(keys)
            self._beat()
            time.sleep(POLL_S)
        members = json.loads(self.store.get(f"{number}/complete"))
        for rank, member in enumerate(members):
            if member["machines"] != self.nodes.many:
                raise NoMeeting(
                    f"launch.nodes={self.nodes.many}, but machine {rank} ({member['host']}) has "
                    f"launch.nodes={member['machines']}; give all machines the same"
                )
        if members[self.nodes.rank]["token"] != self.token:
            raise self._double(members[self.nodes.rank])
        return members

    def _beat(self) -> None:
        """Gives a sign of life, at most one a second."""
        if time.monotonic() - self.last_beat > BEAT_S:
            self.last_beat = time.monotonic()
            self.store.add(f"beats/{self.token}", 1)

    def _missing(self, keys: list[str]) -> NoMeeting:
        ranks = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return NoMeeting(
            f"launch.nodes={self.nodes.many}: machine {', '.join(map(str, ranks))} did not come"
            f" within {self.nodes.timeout_s:.0f} s; start the same command there, with its"
            " launch.node_rank"
        )

    def _lost(self) -> NoMeeting:
        return NoMeeting(
            f"launch.rdzv_endpoint={self.nodes.endpoint}: machine 0 is gone, so this one stops as"
            " well; what it said last is on its console. Start all machines again, and the run"
            " goes on from its checkpoint"
        )

    def _introduce(self, members: list[dict[str, Any]]) -> None:
        """Reports the number of this machine; the run itself is shown by machine 0."""
        rank = self.nodes.rank
        where = (
            "this console tells of the run"
            if rank == 0
            else f"machine 0 ({members[0]['host']}) tells of the run"
        )
        again = "" if self.round == 0 else ", started again"
        self.say(
            f"machine {rank} of {self.nodes.many} ({members[rank]['host']}) has joined{again};"
            f" {where}"
        )


def store_of(server: socket.socket, limit: timedelta) -> Any:
    """Returns a store that listens on a bound socket, not on all networks as it would by itself."""
    address, port = server.getsockname()[:2]
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address,
        port,
        is_master=True,
        timeout=limit,
        wait_for_workers=False,
        master_listen_fd=server.detach(),
    )


rendezvous_handler_registry.register(BACKEND, lambda parameters: parameters.config["meeting"])
