"""The table of devices that plans go by: what each can compute, hold and send in a second."""

import os
import re
from pathlib import Path
from typing import Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError

from trainer.config.finding import Finding, render
from trainer.config.nodes import ConfigGroup
from trainer.config.scalars import Positive
from trainer.errors import BAD_CONFIG, UserError
from trainer.files.limited_reader import yaml_file

TABLE = Path(__file__).with_name("devices.yaml")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)({'|'.join(UNITS)})")


class KernelRates(ConfigGroup):
    """FLOP/s of the kernels of a device, by dtype."""

    matmul: dict[str, Positive]
    attention: dict[str, Positive]


class Device(ConfigGroup):
    """One device and the links that it sends over; see devices.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["cpu", "cuda"]
    memory: str | None
    flops: KernelRates
    memory_bandwidth: Positive
    cache: str | None = None
    cache_bandwidth: Positive | None = None
    host: Positive
    within: Positive
    across: Positive
    devices: int = Field(ge=1)
    operation_s: Positive
    overlaps: bool

    @property
    def memory_bytes(self) -> int:
        """Bytes of one device."""
        if self.memory is None:
            return host_memory_bytes()
        size = size_of(self.memory)
        assert size is not None, "checked when the table was read"
        return size

    def bandwidth(self, moved: int) -> float:
        """Bytes/s at which an operation reads and writes so many bytes in all."""
        cached = 0 if self.cache is None else size_of(self.cache) or 0
        if self.cache_bandwidth is None or moved > cached:
            return self.memory_bandwidth
        return self.cache_bandwidth

    def rate(self, kernel: str, precision: str) -> float:
        """FLOP/s of a kernel, matmul or attention."""
        rates = self.flops.matmul if kernel == "matmul" else self.flops.attention
        return rates.get(precision) or min(rates.values())


def read_device(name: str) -> Device:
    """Returns a device by its name in the table, or by the path of a file that has one.

    Raises:
        UserError: there is none, or what is there does not describe one.
    """
    table = yaml.safe_load(TABLE.read_text())
    if name in table:
        return Device.model_validate(table[name])
    known = ", ".join(table)
    if not name.endswith(".yaml"):
        _refuse(name, f"the table has {known}", "use one of them, or the yaml file of a machine")
    try:
        described = yaml_file(Path(name), follow=True)
        device = Device.model_validate(described)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        _refuse(name, f"{where}: {first['msg']}", "write it with python -m scripts.calibrate")
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        _refuse(name, f"it cannot be read ({reason})", f"use {known}, or another file")
    for key, size in (("memory", device.memory), ("cache", device.cache)):
        if size is not None and size_of(size) is None:
            _refuse(name, f"{key}: {size} has no unit", "write it as 80GiB")
    return device


def _refuse(name: str, fact: str, remedy: str) -> None:
    raise UserError(render(Finding("device", name, fact, remedy)), BAD_CONFIG)


def size_of(text: str) -> int | None:
    """Returns the bytes that "80GiB" or "1.5GB" says; None where it is no number with a unit."""
    matched = SIZE.fullmatch(text)
    if matched is None:
        return None
    return int(float(matched[1]) * UNITS[matched[2]])


def shown(size: float) -> str:
    """Returns a number of bytes for people."""
    for unit in ("GiB", "MiB", "KiB"):
        if size >= UNITS[unit]:
            return f"{size / UNITS[unit]:,.2f} {unit}"
    return f"{size:,.0f} bytes"


def host_memory_bytes() -> int:
    """Returns the bytes that processes of this machine may use, by the cgroup if it says less."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            said = Path(path).read_text().strip()
        except OSError:
            continue
        if said.isdecimal():
            found = min(found, int(said))
    return found
