"""Grace period of torch's elastic agent, which its versions are given in different ways."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.launcher.api import LaunchConfig

GRACE = "shutdown_timeout"  # the agent's own setting, from torch 2.12 on


@contextmanager
def agent_config(grace_s: int, **settings: Any) -> Iterator[LaunchConfig]:
    """Yields the config of an agent that waits `grace_s` seconds between SIGTERM and SIGKILL.

    The context must last as long as the agent runs.

    Torch 2.11 has no such setting: its agent closes its ranks with a default of 30 s, which cuts
    off a save that takes longer. There the default of the method that it calls is another one for
    as long as the context is open.
    """
    if GRACE in {field.name for field in fields(LaunchConfig)}:
        settings[GRACE] = grace_s
        yield LaunchConfig(**settings)
        return
    usual = PContext.close

    def close(self: PContext, death_sig: Any = None, timeout: int = grace_s) -> None:
        usual(self, death_sig, timeout)

    PContext.close = close  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield LaunchConfig(**settings)
    finally:
        PContext.close = usual  # pyright: ignore[reportAttributeAccessIssue]
