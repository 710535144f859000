"""Engine that shards parameters, gradients and optimiser state over all ranks with torch's FSDP2.

Every rank is a shard, whether it shares its sequence or not: parameters know nothing of context
parallelism. Where the mesh has replicas, each of them is sharded over its own ranks, and gradients
are summed in it, then across (HSDP). A stack of experts lies over its ranks by expert and, by
another dim, over the ranks that hold the same experts.
Source: Zhao et al. 2023 (arXiv:2304.11277) for the idea. FSDP2 averages gradients; we make it add
them (see Engine).
"""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from models.primitives.sequential import sequential_modules
from parallel.engines.base import BuildOptimiser, Engine, blocks_of
from parallel.engines.expert_sharding import even_dim, share_experts
from parallel.engines.gradients import all_reduce_gradients, used_anywhere
from parallel.engines.materialize import materialize
from parallel.engines.unused import reduce_unused
from parallel.mesh import Mesh


class Fsdp(Engine):
    """A block's parameters are gathered for its forward and its backward only.

    Args:
        reshard_after_forward: False keeps the gathered parameters from forward to backward: less
            traffic, more memory.
        others: as Engine.

    Between micro-batches the gradients stay whole and unsummed, and are reduced once, after the
    last.

    Raises:
        ValueError: torch.distributed was not started.
    """

    def __init__(
        self,
        mesh: Mesh,
        optimiser: BuildOptimiser,
        *,
        precision: str = "float32",
        seed: int = 0,
        checkpointing: str = "none",
        compile: bool = False,
        offload: str | None = None,
        reshard_after_forward: bool = True,
    ):
        super().__init__(
            mesh,
            optimiser,
            precision=precision,
            seed=seed,
            checkpointing=checkpointing,
            compile=compile,
            offload=offload,
        )
        if mesh.device_mesh is None:
            raise ValueError(
                "engine=fsdp needs started ranks, and there are none; use engine=single in one"
                " process"
            )
        self.reshard_after_forward = reshard_after_forward

    def _place(self, model: nn.Module) -> nn.Module:
        policy = MixedPrecisionPolicy()
        if self.precision == "bfloat16":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        apart = self._place_experts(model, policy)
        apart |= {
            parameter for parameter in model.parameters() if parameter.dim() == 0
        }  # FSDP2 cuts no scalar
        options: dict[str, Any] = {
            "mesh": self.mesh.device_mesh,
            "mp_policy": policy,
            "ignored_params": apart,
        }
        for block in _separable(model):
            fully_shard(block, reshard_after_forward=self.reshard_after_forward, **options)
        fully_shard(
            model, reshard_after_forward=False, **options
        )  # backward begins with what the root gathered
        self.used = Used(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                _look_before_forward(module, self.used.watch(module))
                reduce_unused(module)  # ranks may need other parameters: the exchange is the same
                # a sum, not a mean: gloo has no pre-multiplied sum, so the plain one is forced
                # before the factor of 1
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        kept = {id(parameter) for parameter in apart}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in kept}
        self.drawn = materialize(model, self.mesh.device, self.seed, self.how)
        self.apart = [parameter for name, parameter in model.named_parameters() if name in names]
        return model

    def _place_experts(self, model: nn.Module, policy: MixedPrecisionPolicy) -> set[nn.Parameter]:
        """Shard the stacks of experts over the ranks that hold the same; what cannot be cut evenly
        there stays apart."""
        apart: set[nn.Parameter] = set()
        for module in share_experts(model, self.mesh, self.computed):
            assert self.mesh.experts_mesh is not None
            holders = self.mesh.experts_mesh[self.mesh.experts_mesh.mesh_dim_names[:-1]]  # type: ignore[index]
            ranks = holders.size(holders.ndim - 1)
            dims = {id(stack): even_dim(stack, ranks) for stack in module.parameters()}
            if (
                ranks == 1 or None in dims.values()
            ):  # FSDP2 cuts evenly only, but for dim 0, which is the experts' already
                apart.update(module.parameters())
                continue
            fully_shard(
                module,
                mesh=holders,
                mp_policy=policy,
                reshard_after_forward=self.reshard_after_forward,
                shard_placement_fn=lambda stack, dims=dims: Shard(cast(int, dims[id(stack)])),
            )
        return apart

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See Engine.backward. All ranks must hand in the same number of micro-batches."""
        sharded = cast(FSDPModule, self.model)
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
        loss.backward()
        if last:
            trained = [parameter for parameter in self.apart if parameter.requires_grad]
            all_reduce_gradients(trained, self.mesh.world.group, self.mesh.expert_data.group)
            self._drop_unused()

    def _drop_unused(self) -> None:
        """Give back None, as in the other engines, to the parameters that no rank needed: they got
        zeros above."""
        names = [name for name in self.used.names if name in self.parameters]
        flags = [name in self.used.here for name in names]
        somewhere = used_anywhere(flags, self.mesh.world.group)
        for name, used in zip(names, somewhere, strict=True):
            if not used:
                self.parameters[name].grad = None
        self.used.here.clear()


class Used:
    """Records which sharded parameters got a gradient on this rank.

    FSDP2 computes with whole tensors that stand in for the shards while a module runs: those are
    watched.

    Attributes: names: of all parameters that are sharded. here: of those that got a gradient since
        it was cleared.
    """

    def __init__(self, model: nn.Module):
        self.names: list[str] = []
        self.here: set[str] = set()
        self._name_of = {id(parameter): name for name, parameter in model.named_parameters()}
        self._watched: dict[str, weakref.ref] = {}

    def watch(self, unit: FSDPModule) -> Callable[[], None]:
        """Returns the hook to call while the unit's parameters are gathered."""
        inner: set[nn.Module] = set()
        for module in cast(nn.Module, unit).modules():
            if module is not unit and isinstance(module, FSDPModule):
                inner.update(cast(nn.Module, module).modules())
        owned = [
            (self._name_of[id(parameter)], module, leaf)
            for module in cast(nn.Module, unit).modules()
            if module not in inner
            for leaf, parameter in module.named_parameters(recurse=False)
            if isinstance(parameter, DTensor) and parameter.requires_grad
        ]
        self.names += dict.fromkeys(name for name, _, _ in owned)

        def look() -> None:
            for name, module, leaf in owned:
                whole = module.get_parameter(leaf)
                known = self._watched.get(name)
                if known is None or known() is not whole:
                    whole.register_post_accumulate_grad_hook(
                        lambda _, name=name: self.here.add(name)
                    )
                    self._watched[name] = weakref.ref(whole)

        return look


def _look_before_forward(module: nn.Module, look: Callable[[], None]) -> None:
    """Calls `look` right before a module's own forward, while its parameters are whole.

    A hook of the module would run before FSDP2 has gathered them.
    """
    forward = module.forward

    def looked_at(*args: Any, **kwargs: Any) -> Any:
        look()
        return forward(*args, **kwargs)

    module.forward = looked_at


def _separable(model: nn.Module) -> list[nn.Module]:
    """The blocks that own all their parameters; one that shares some with others is left to the
    root.

    FSDP2 cannot have one parameter in two units. Blocks that run inside the steps of a
    SequentialScan are left to the root too: ranks go through them at different times, so what they
    need is gathered before the first step and reduced after the last.
    """
    inside_steps = sequential_modules(model)
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))

    def apart(block: nn.Module) -> bool:
        inside = Counter(
            id(p) for module in block.modules() for p in module.parameters(recurse=False)
        )
        return bool(inside) and all(owners[key] == count for key, count in inside.items())

    return [block for block in blocks_of(model) if apart(block) and block not in inside_steps]
