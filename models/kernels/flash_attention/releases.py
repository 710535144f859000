"""The releases of flash-attn that may be installed: 2, 3 and 4, with the arguments of each.

Dao 2023 (arXiv:2307.08691), Shah et al. 2024 (arXiv:2407.08608) and the rewrite in CuTe
(github.com/Dao-AILab/flash-attention). Each has a forward pass that returns the lse, and a backward
pass that takes one, so an lse over ALL keys may come from outside: a block of a ring is a call. All
take half precision, grouped heads, packed stretches under one pair of bounds, and count bounds from
the last query and the last key, as models/kernels/band_plan.py does.

The functions called are not those of the packages' autograd, which keep the lse to themselves, but
those below it; their arguments change between releases. A release whose functions lack an argument
that is passed here is not used, and one that fails is given up; both warn once. Called are
flash-attn 2 from 2.7 on, flash-attn 3 of 2026 and flash-attn 4 from 4.0.0b36 on. No card has run
these calls: they are held to the reference by stand-ins that have the packages' signatures.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

Functions = tuple[Callable[..., Any], ...]

FLASH_2, FLASH_3, FLASH_4 = "flash-attn 2", "flash-attn 3", "flash-attn 4"
WIDEST = 256


class Release(NamedTuple):
    """The functions of a version and their arguments.

    Attributes:
        distribution: the installed package, for its version.
        module: holds the functions.
        needs: a module of its own that it cannot do without; flash-attn 2 brings files of 4 along.
        functions: forward and backward of rows, forward and backward of packed stretches.
        forward, backward: arguments that are the same in every call.
        causal: the flag's name in forward and in backward.
        lse: its name in backward.
        unbounded: what stands for no bound.
    """

    distribution: str
    module: str
    needs: str
    functions: tuple[str, str, str, str]
    forward: dict[str, Any]
    backward: dict[str, Any]
    causal: tuple[str, str] = ("causal", "causal")
    lse: str = "softmax_lse"
    unbounded: int | None = -1


RELEASES = {
    FLASH_2: Release(
        "flash-attn",
        "flash_attn.flash_attn_interface",
        "flash_attn_2_cuda",
        (
            "_flash_attn_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_forward",
            "_flash_attn_varlen_backward",
        ),
        {"dropout_p": 0.0, "alibi_slopes": None, "return_softmax": False},
        {"dropout_p": 0.0, "alibi_slopes": None},
    ),
    FLASH_3: Release(
        "flash-attn-3",
        "flash_attn_interface",
        "flash_attn_3",
        (
            "_flash_attn_forward",
            "_flash_attn_backward",
            "_flash_attn_forward",
            "_flash_attn_backward",
        ),
        {},
        {},
        causal=("causal", "is_causal"),
    ),
    FLASH_4: Release(
        "flash-attn-4",
        "flash_attn.cute.interface",
        "cutlass",
        ("_flash_attn_fwd", "_flash_attn_bwd", "_flash_attn_fwd", "_flash_attn_bwd"),
        {"return_lse": True},
        {},
        lse="lse",
        unbounded=None,
    ),
}
GIVEN_UP: set[str] = set()  # versions that have failed in this process


def available() -> tuple[str, ...]:
    """Returns the versions that are installed here, can be called and have not failed."""
    return tuple(name for name in RELEASES if name not in GIVEN_UP and load_release(name))


def version(name: str) -> str:
    """Returns the version of an installed release; empty where its package does not say."""
    try:
        return importlib.metadata.version(RELEASES[name].distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def widths(name: str, generation: tuple[int, int], key: int, value: int) -> tuple[int, int] | None:
    """Returns what widths of keys and values are filled up to; None where they are not served.

    Args:
        generation: of the GPU.
        key, value: multiples of 8.
    """
    widest = max(key, value)
    if name == FLASH_3 and widest > 192 and torch.are_deterministic_algorithms_enabled():
        return None
    if name == FLASH_4 and generation[0] >= 10 and widest > 128:
        # Three shapes have kernels of their own beyond 128.
        if key <= 192 and value <= 128:
            return 192, 128
        return (WIDEST, WIDEST) if key == value == WIDEST else None
    return (widest, widest) if widest <= WIDEST else None


def takes_cap(kernel: str, generation: tuple[int, int], key: int) -> bool:
    """Tells whether a kernel caps logits, backward too.

    Args:
        kernel: any, of flash-attn or not.
        generation: of the GPU.
        key: width that keys are filled up to.
    """
    refused = kernel == FLASH_4 and generation[0] >= 10 and key == WIDEST
    return kernel in RELEASES and not refused


@lru_cache
def load_release(name: str) -> Functions | None:
    """Returns the four functions of Release; None where the package is missing or unfit.

    A package that is there and cannot be used is warned of once.
    """
    release = RELEASES[name]
    try:
        if importlib.util.find_spec(release.module) is None:
            return None
        module = importlib.import_module(release.module)
        functions = tuple(getattr(module, function) for function in release.functions)
        for function, passed in zip(functions, _passed(release), strict=True):
            missing = passed - _argument_names(function)
            if missing:
                raise TypeError(f"{release.module} takes no {', '.join(sorted(missing))}")
        return functions
    except ModuleNotFoundError as error:
        absent = error.name or ""
        if release.module.startswith(absent) or absent.startswith(release.needs):
            return None
        problem = error
    except Exception as error:
        # A package built for another version of torch may fail in any way.
        problem = error
    _warn(name, problem)
    return None


def _argument_names(function: Callable[..., Any]) -> set[str]:
    # An operator of torch.library shows the arguments of the function that it was made of.
    return set(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _passed(release: Release) -> list[set[str]]:
    """Returns the names of the arguments of each function."""
    shared = {"q", "k", "v", "softmax_scale", "softcap", "window_size_left", "window_size_right"}
    forward = {*shared, *release.forward, release.causal[0]}
    gradients = {"dout", "out", release.lse, "dq", "dk", "dv", "deterministic"}
    backward = {*shared, *release.backward, release.causal[1], *gradients}
    packed = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
    return [forward, backward, forward | packed, backward | packed]


def _warn(name: str, problem: Exception) -> None:
    warnings.warn(
        f"no {name} ({type(problem).__name__}: {problem}); another attention kernel serves in its"
        " place",
        stacklevel=3,
    )


def attempt(name: str, run: Callable[[Functions], Any]) -> Any:
    """Runs functions of a version: what `run` returns of them, or None.

    A version that fails is given up, and `available` names it no more.
    """
    functions = load_release(name)
    assert functions is not None, f"{name} is not among {available()}"
    try:
        return run(functions)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:
        GIVEN_UP.add(name)
        _warn(name, problem)
        return None
