"""The things that a run depends on besides its config: the code, the packages and the machine."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "numpy",
    "hydra-core",
    "omegaconf",
    "pydantic",
    "datasets",
    "pyarrow",
    "tokenizers",
    "wandb",
)
PACKAGES += ("deepspeed", "flash-attn", "flash-attn-3", "flash-attn-4")
PACKAGES += ("flash-linear-attention", "triton", "liger-kernel")


def environment() -> dict[str, Any]:
    """Returns what a run depends on besides its config.

    Environment variables are left out, because some hold secrets.
    """
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = None
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or [
        platform.processor() or "cpu"
    ]
    return {
        "commit": _git("rev-parse", "HEAD"),
        "diff": _git("diff", "HEAD"),
        "python": sys.version.split()[0],
        "packages": installed,
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "devices": devices,
        "command": sys.argv,
    }


def _git(*words: str) -> str | None:
    """Returns the output of git about the code that runs; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
