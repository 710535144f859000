"""This process as the only rank that torchrun started, for runs without processes of their own."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def as_only_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        place = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        for name, value in {"TORCHELASTIC_RUN_ID": "here", **place, **meeting}.items():
            patch.setenv(name, str(value))
        before = dict(os.environ)
        yield
        assert dict(os.environ) == before
