"""Run as a program, in a process of its own: a kernel of flash-linear-attention in Triton's
interpreter, on the CPU.

Prints the worst difference of our use of it, forward and all gradients, from our own scan in
float64, in units of each tensor's largest magnitude. Arguments: the kind of scan and `before` where
the state is read before the update.

Three things are changed in the packages so that they run without a GPU: the autotuner takes its
first configuration and times nothing; `gather`, which is bound before the interpreter can replace
it, is looked up late; loops count in tensors.
"""

import sys

import torch
import triton.language
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import interpreter_semantic

from models.kernels.scan_fla import FlaScan, load_kernel, scan_kind
from models.kernels.varlen import varlen_layout
from models.primitives.scan import Scan
from tests.support.parity import packed, relative
from tests.support.scan_inputs import inputs

RUNS = [[5, 20, 0], [12, 6, 7]]


def gather(source, index, axis):
    return triton.language.gather(source, index, axis)


def steps(*bounds):
    """The numbers of a loop as tensors, which one kernel expects of them."""
    return (interpreter_semantic.to_tensor(i, False) for i in range(*map(int, bounds)))


def patch() -> None:
    Autotuner._bench = lambda self, *args, config, **kwargs: [1.0, 1.0, 1.0]  # pyright: ignore
    for name, module in list(sys.modules.items()):
        if name.startswith("fla.") and "gather" in vars(module):
            module.gather = gather  # pyright: ignore[reportAttributeAccessIssue]
        if name == "fla.ops.rwkv6.chunk":
            module.range = steps  # pyright: ignore[reportAttributeAccessIssue]


def answers(work, leaves, states) -> list[torch.Tensor]:
    keep, gain, _ = work.summarise()
    found = [keep, gain, work.read(states), work.final_states(states)]
    generator = torch.Generator().manual_seed(4)
    weights = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found
    ]
    total = torch.stack([(x * weight).sum() for x, weight in zip(found, weights)]).sum()
    return [*(x.detach() for x in found), *torch.autograd.grad(total, [*leaves, states])]


def worst(kind: str, before: bool) -> float:
    span = packed([[9, 1, 13], [3, 20]], 25)
    query, payload = inputs(kind, span, heads=1, keys=16, values=16, strength=0.3)
    row = scan_kind(payload, before)
    assert row
    kernel = load_kernel(row)
    assert kernel, "the package is there"
    patch()
    states = torch.randn(
        2, 3, 1, 16, 16, generator=torch.Generator().manual_seed(8), dtype=torch.float64
    )
    tensors = [*query, *payload]
    exact = [x.clone().requires_grad_() for x in (*tensors, states)]
    ours = answers(
        Scan(before=before).open(exact[:1], exact[1:-1], span=span, runs=RUNS),
        exact[:-1],
        exact[-1],
    )
    leaves = [x.float().requires_grad_() for x in (*tensors, states)]
    work = FlaScan(row, kernel, leaves[0], leaves[1:-1], varlen_layout(span, RUNS))
    theirs = answers(work, leaves[:-1], leaves[-1])
    return max(relative(a.double(), b) for a, b in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    print("worst", worst(sys.argv[1], "before" in sys.argv[2:]))
