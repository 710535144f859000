"""The machines of a run, as one of them sees it, and the address at which each can be reached."""

import ipaddress
import secrets
import socket
from dataclasses import dataclass, field

import psutil

LOOPBACK = "127.0.0.1"


class NoMeeting(Exception):
    """The machines of a run cannot meet, or one was lost; the message is for the user."""


@dataclass(frozen=True)
class Nodes:
    """The machines of a run, as one of them sees it.

    Attributes: many: machines, each with as many ranks. rank: which of them this is; 0 holds the
        meeting. endpoint: HOST:PORT of machine 0. address: by which the others reach this one; None
        = its name. name: of the run, the same on all. timeout_s: longest wait for the others, also
        for one that comes back. secret: by which the ranks of all machines know one another, the
        same on all; one machine has a fresh one.
    """

    many: int
    rank: int
    endpoint: str
    address: str | None
    name: str
    timeout_s: float
    secret: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)

    @property
    def host(self) -> str:
        """The host of the endpoint, without the brackets of an IPv6 address."""
        return self.endpoint.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of the endpoint; 0 = a free one."""
        return int(self.endpoint.rpartition(":")[2])

    @property
    def near(self) -> bool:
        """Tells whether all of them are this machine (loopback addresses)."""
        return (
            self.many == 1
            or self.host == "localhost"
            or self.host.startswith("127.")
            or self.host == "::1"
        )

    def listening_address(self) -> str:
        """Returns the one address of machine 0 at which the meeting is held.

        Raises:
            NoMeeting: the host of the endpoint has no address here that other machines could reach.
        """
        address = resolved(self.host)
        if self.near or not loopback(address):
            return address
        # Some systems give their own name a loopback address, under which no other machine finds
        # them.
        outward = self.address and resolved(self.address)
        if not outward or loopback(outward):
            raise NoMeeting(
                f"launch.rdzv_endpoint={self.endpoint}: {self.host} is {address} on this machine,"
                " which no other machine reaches; give launch.address=ADDRESS, or an address"
                " instead of the name"
            )
        return outward

    def own_address(self) -> str:
        """Returns the address of this machine from which the others are reached.

        Raises:
            NoMeeting: the endpoint, or launch.address, is the name of nothing.
        """
        if self.near:
            return LOOPBACK
        if self.address is not None:
            return resolved(self.address)
        return self.listening_address() if self.rank == 0 else outward_address(resolved(self.host))


def single_machine(name: str) -> Nodes:
    """Returns one machine that meets itself."""
    return Nodes(1, 0, f"{LOOPBACK}:0", LOOPBACK, name, 600)


def resolved(host: str) -> str:
    """Returns the numeric address of a host, an IPv4 address where it has one.

    Raises:
        NoMeeting: the name is unknown.
    """
    try:
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise NoMeeting(
            f"{host}: no machine of that name is known here ({error.strerror}); give an address"
        ) from error
    answers.sort(key=lambda answer: answer[0] != socket.AF_INET)
    return str(answers[0][4][0])


def loopback(address: str) -> bool:
    """Tells whether an address reaches this machine alone."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def outward_address(peer: str) -> str:
    """Returns the address of this machine on the way to another.

    Connecting a datagram socket sends nothing.
    """
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((peer, 9))
        except OSError as error:
            raise NoMeeting(
                f"launch.rdzv_endpoint: no network leads to {peer} ({error.strerror}); give"
                " launch.address"
            ) from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str | None:
    """Returns the name of the network interface that has an address; None where none has it.

    All of 127.0.0.0/8 is the loopback interface's, which lists one address only.
    """
    wanted = LOOPBACK if loopback(address) and ":" not in address else address
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == wanted for entry in entries):
            return name
    return None


def listener(address: str, port: int) -> socket.socket:
    """Opens a socket that listens at one address alone; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=2048)
