"""A mode in which the code of a step runs without its floating-point numbers.

Addresses, layouts and plans are worked out for real, because the code reads them; activations,
weights and moments have a shape, a type and a device, and no memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor

from trainer.planning.step_costs import tensors_in

READ = torch.ops.aten._local_scalar_dense.default  # what reads a number from a tensor
FIND = torch.ops.aten.nonzero.default
FEW = 1  # elements up to which a new tensor is real: counters of steps


class FakeArithmetic(FakeTensorMode):
    """Computes with what is real among itself; all that meets a fake tensor is fake.

    A number that is read from a fake tensor is 1: norms are finite, weights of losses equal, and
    there are tokens to predict. What is looked for in one is found at every place.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.within_fake = False  # inside an operation whose result is fake

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Decides for one operation whether it is computed."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        tensors = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
        fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if func is READ and fake:
            dtype = tensors[0].dtype
            return True if dtype == torch.bool else torch.ones((), dtype=dtype).item()
        if func is FIND and fake:
            (where,) = args
            return where.new_empty((where.numel(), where.dim()), dtype=torch.long)
        if fake or self.within_fake:
            # Some are made of others, such as an empty tensor of whole numbers that is filled.
            outer = self.within_fake
            self.within_fake = True
            try:
                return super().dispatch(func, types, args, kwargs)
            finally:
                self.within_fake = outer
        if tensors and all(not tensor.is_meta for tensor in tensors):
            return func(*args, **kwargs)
        result = super().dispatch(func, types, args, kwargs)
        if isinstance(result, Tensor) and _is_small_or_counts(result):
            return func(*args, **kwargs)
        return result


def _is_small_or_counts(tensor: Tensor) -> bool:
    integral = not tensor.is_floating_point() and not tensor.is_complex()
    return not tensor.is_meta and (integral or tensor.numel() <= FEW)
