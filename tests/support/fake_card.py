"""A device that is there by name only: fake tensors on it have a shape, a dtype and a place.

An operation that mixes it with the host fails, as it would on a GPU. Nothing is computed.
"""

import functools

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"


@functools.cache
def fake_card() -> torch.device:
    """Registers the device in this process and returns it."""
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(f"{NAME}:0")
