"""Compiles the kernels for GPUs that are not there, and reads what they take from the assembler.

Triton makes PTX for any generation without a card, and NVIDIA's assembler, which comes with Triton,
reports registers and what it had to spill.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from models.kernels.triton_attention.arguments import Addresses, Bias, How, Lists, StridedTensor
from models.kernels.triton_attention.backward import key_gradient_kernel, query_gradient_kernel
from models.kernels.triton_attention.forward import forward_kernel
from models.kernels.triton_attention.launch import PRECISION
from models.kernels.triton_attention.programs import translate
from models.kernels.triton_attention.sizes import (
    FORWARD,
    KEY_GRADIENT,
    QUERY_GRADIENT,
    filled_up,
    size_of,
    widest,
)
from models.kernels.triton_attention.terms import DISTANCES, NO_BIAS, SLOPES, is_heavy
from models.masks.basic import Causal, FirstTokens, SameDocument, SlidingWindow
from models.masks.roles import PrefixTokens

KERNELS = {
    FORWARD: forward_kernel,
    QUERY_GRADIENT: query_gradient_kernel,
    KEY_GRADIENT: key_gradient_kernel,
}
TENSORS = {FORWARD: 5, QUERY_GRADIENT: 7, KEY_GRADIENT: 8}  # strided tensors that each begins with
WIDE_TENSORS = {FORWARD: 2, QUERY_GRADIENT: 3, KEY_GRADIENT: 4}  # float32, the last of them
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
ARCHITECTURES = (80, 90, 100)
DOCUMENTS = Causal() & SameDocument()
SINKS = DOCUMENTS & (SlidingWindow(1024) | FirstTokens(4) | PrefixTokens())
# (mask, bias, capped) of the kernels that are reported: of a mask alone, and with each bias.
CASES = {
    "window, sinks, prefix": (SINKS, NO_BIAS, False),
    "ALiBi": (DOCUMENTS, SLOPES, False),
    "T5, soft cap": (DOCUMENTS, DISTANCES, True),
}
DIVISIBLE = [["tt.divisibility", 16]]


class Compiled(NamedTuple):
    """Resources that a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread, stored and loaded, the larger of the two.
        shared: bytes of shared memory of a program.
    """

    kernel: str
    case: str
    widths: tuple[int, int]
    dtype: torch.dtype
    architecture: int
    sides: tuple[int, int]
    warps: int
    registers: int
    spilled: int
    shared: int


def compiled_kernels(
    kernels: Sequence[str] = tuple(KERNELS),
    cases: Sequence[str] = tuple(CASES),
    widths: Sequence[tuple[int, int]] = ((64, 64), (128, 128), (192, 128), (256, 256)),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
    architectures: Sequence[int] = ARCHITECTURES,
) -> Iterator[Compiled]:
    """Yields what each kernel takes."""
    for architecture in architectures:
        for dtype in dtypes:
            for width in [each for each in widths if max(each) <= widest(dtype)]:
                for case in cases:
                    for kernel in kernels:
                        yield compile_kernel(kernel, case, width, dtype, architecture)


def compile_kernel(
    kernel: str, case: str, widths: tuple[int, int], dtype: torch.dtype, architecture: int
) -> Compiled:
    """Compiles one kernel."""
    mask, bias, capped = CASES[case]
    program = translate(mask)
    assert program is not None
    key_width, value_width = map(filled_up, widths)
    heavy = is_heavy(bias, capped)
    size = size_of(kernel, dtype, max(key_width, value_width), heavy=heavy)
    how = How(
        program.code,
        bias,
        capped,
        PRECISION,
        *widths,
        key_width,
        value_width,
        size.side_q,
        size.side_k,
    )
    function: Any = KERNELS[kernel]
    signature, attributes = _signature(kernel, dtype)
    named = dict(zip(function.arg_names, (*signature, "constexpr"), strict=True))
    source = ASTSource(function, named, {"HOW": how}, attributes)
    built = triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": size.warps, "num_stages": size.stages},
    )
    registers, spilled = _assembled(built.asm["ptx"], architecture)
    shared = built.metadata.shared
    return Compiled(
        kernel, case, widths, dtype, architecture, size[:2], size.warps, registers, spilled, shared
    )


def _signature(kernel: str, dtype: torch.dtype) -> tuple[list[Any], dict[tuple[int, ...], Any]]:
    """(types of the arguments, what is known of them): what a launch finds in common tensors."""
    signature: list[Any] = []
    wide = TENSORS[kernel] - WIDE_TENSORS[kernel]
    for number in range(TENSORS[kernel]):
        kind = TYPES[dtype] if number < wide else "*fp32"
        signature.append(StridedTensor(kind, "i32", "i32", "i32"))
    if kernel == QUERY_GRADIENT:
        signature.append("*fp32")
    signature += [Addresses("*i32", "i32", "i32")] * 2
    signature.append(Bias("*i32", "*fp32", "i32", "i32", "fp32", "fp32"))
    signature.append(Lists("*i32", "*i32"))
    signature.append("i32")
    attributes: dict[tuple[int, ...], Any] = {}
    for place, kind in enumerate(signature):
        fields = kind if isinstance(kind, tuple) else (kind,)
        for field, name in enumerate(fields):
            if str(name).startswith("*") or isinstance(kind, StridedTensor):
                path = (place, field) if isinstance(kind, tuple) else (place,)
                attributes[path] = DIVISIBLE
    return signature, attributes


def _assembled(ptx: str, architecture: int) -> tuple[int, int]:
    """(registers, bytes spilled) of a thread."""
    name = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        words = [assembler, "-v", f"-arch=sm_{architecture}{suffix}", path, "-o", f"{path}.cubin"]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stderr
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", told)]
    return int(re.findall(r"Used (\d+) registers", told)[-1]), max(spilled)
