"""Our own Triton kernels in a plan of a GPU: what they are handed is counted, nothing is launched.

They are chosen as in a run, by models/kernels/triton_attention/dispatch.py, which
`python -m scripts.kernels` asks too. Their FLOPs are those of the blocks of pairs on their lists,
at the rate that a device has for attention: no card has timed them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from models.kernels import backends
from models.kernels.triton_attention import dispatch
from models.kernels.triton_attention.arguments import How, Lists
from models.kernels.triton_attention.block_lists import Ranges
from models.kernels.triton_attention.sizes import FORWARD, KEY_GRADIENT, QUERY_GRADIENT
from trainer.planning.devices import Device
from trainer.planning.step_costs import StepCosts, tensors_in

# Products over the width of keys, and over that of values: backward computes the scores twice.
PRODUCTS = {FORWARD: (1, 1), QUERY_GRADIENT: (2, 1), KEY_GRADIENT: (2, 2)}
LAUNCHED = {
    "forward_kernel": FORWARD,
    "query_gradient_kernel": QUERY_GRADIENT,
    "key_gradient_kernel": KEY_GRADIENT,
}


class CountedKernel:
    """Stands for a kernel of Triton: notes a launch.

    Args:
        name: of PRODUCTS.
        costs: receives FLOPs, bytes and seconds.
    """

    def __init__(self, name: str, costs: StepCosts):
        self.name = name
        self.costs = costs

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        _, heads, _ = grid

        def launch(*args: Any, HOW: How, **options: Any) -> None:
            lists = next(arg for arg in args if isinstance(arg, Lists))
            over_keys, over_values = PRODUCTS[self.name]
            channels = over_keys * HOW.width_key + over_values * HOW.width_value
            pairs = blocks_on(lists) * HOW.side_q * HOW.side_k
            moved = sum(tensor.nbytes for tensor in tensors_in(args))
            self.costs.note_attention(2.0 * heads * pairs * channels, moved)

        return launch


def blocks_on(lists: Lists | Ranges) -> int:
    """Returns the number of pairs of blocks of all rows that a kernel computes for a head."""
    lengths = lists.ranges[:, 1] - lists.ranges[:, 0]
    before = torch.cat([lengths.new_zeros(1), lengths]).long().cumsum(0)
    clear, clear_end, masked, masked_end = lists.index.long().unbind(-1)
    count = before[clear_end] - before[clear] + before[masked_end] - before[masked]
    return int(count.sum())


@contextmanager
def counted_kernels(costs: StepCosts, device: Device) -> Iterator[None]:
    """Has attention that our Triton kernels serve on a GPU counted as theirs.

    Args:
        costs: receives the costs.
        device: that the run is planned for; tensors are said to be the CPU's.
    """
    module = backends.load_pairwise() if device.kind == "cuda" else None
    if module is None:
        yield
        return
    served = set(backends.PAIRWISE)
    kernels = {name: getattr(module, name) for name in LAUNCHED}
    has_numbers = dispatch.has_numbers
    backends.PAIRWISE.update(("cpu", dtype) for kind, dtype in served if kind == "cuda")
    dispatch.has_numbers = _asked_for_shapes
    _put(module, {name: CountedKernel(kernel, costs) for name, kernel in LAUNCHED.items()})
    try:
        yield
    finally:
        _put(module, kernels)
        dispatch.has_numbers = has_numbers
        backends.PAIRWISE.clear()
        backends.PAIRWISE.update(served)


def _asked_for_shapes(tensors: Any) -> bool:
    return not any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors)


def _put(module: ModuleType, kernels: dict[str, Any]) -> None:
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
