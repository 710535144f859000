"""Engine that trains with DeepSpeed's ZeRO: optimiser state (1), gradients (2) and parameters (3)
sharded over all ranks.

To DeepSpeed every rank is a data rank, whether it shares its sequence or not: its own
sequence-parallel groups give wrong gradients in stages 0, 1 and 2 (of 0.19.8), and parameters know
nothing of context parallelism anyway. It averages gradients; the loss is multiplied by the number
of ranks, so that they add up (see Engine).
Source: Rajbhandari et al. 2020 (arXiv:1910.02054); offloading: Ren et al. 2021 (arXiv:2101.06840).
"""

import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import deepspeed
import deepspeed.ops
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer

from parallel.engines.base import STORED, BuildOptimiser, Engine, blocks_of, same
from parallel.engines.deepspeed_limits import STAGE, misfits
from parallel.engines.gradients import clip_gradients
from parallel.engines.materialize import materialize, named
from parallel.engines.single import cast_inputs
from parallel.mesh import Mesh

BUCKET = 25_000_000  # elements that are sent at once
KEPT = (
    100_000  # elements; under ZeRO-3 a parameter of fewer stays whole on every rank between steps
)
OFFLOADED = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "parameters": ("offload_optimizer", "offload_param"),
}


class Deepspeed(Engine):
    """ZeRO 0 to 3; in bfloat16 with float32 masters, sums of gradients and communication (not in
    stage 0).

    Args:
        zero_stage: the stage; 0 = everything whole on every rank, None = 2.
        offload: what lies in the host's memory: none (or None), optimizer (its state and masters),
            parameters (these too).
        others: as Engine.

    The model is built whole in the host's memory of each rank, then sharded. A parameter that no
    rank uses counts as used with a gradient of zero, unlike in the other engines: weight decay
    reaches it.

    Raises:
        ValueError: torch.distributed was not started, and what `misfits` says.
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
        zero_stage: int | None = None,
        offload: str | None = None,
    ):
        super().__init__(
            mesh,
            optimiser,
            precision=precision,
            seed=seed,
            checkpointing=checkpointing,
            compile=compile,
        )
        self.zero_stage = STAGE if zero_stage is None else zero_stage
        self.offload = offload or "none"
        self.keeps_sums = (
            precision == "bfloat16" and self.zero_stage == 1
        )  # DeepSpeed has an optimiser of its own for it
        if mesh.device_mesh is None:
            raise ValueError(
                "engine=deepspeed needs started ranks, and there are none; use engine=single in one"
                " process"
            )
        reasons = misfits(
            self.zero_stage,
            self.offload,
            precision=precision,
            accelerator=mesh.device.type != "cpu",
            experts=mesh.experts.size,
            compile=compile,
        )
        if reasons:
            raise ValueError("\n".join(reasons))

    def wrap(self, model: nn.Module) -> nn.Module:
        """See Engine.wrap. What is returned walks like the plain model: names and modules are its
        own."""
        model = model.to(STORED[self.precision])
        aliases = dict(named(model))
        self.drawn = materialize(
            model, torch.device("cpu") if self.zero_stage else self.mesh.device, self.seed, self.how
        )
        self.plain = model
        self.parameters = dict(model.named_parameters())
        self.aliases = {name: first for name, first in aliases.items() if first in self.parameters}
        masters = {}
        if (
            self.precision == "bfloat16"
        ):  # DeepSpeed rounds the weights first and takes its masters from these
            masters = {
                name: parameter.detach().cpu().clone()
                for name, parameter in self.parameters.items()
            }
            for module in (model, *blocks_of(model)):
                module.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        self.optimiser = self.build_optimiser(model, self.parameters)
        blank = {id(parameter): state for parameter, state in self.optimiser.state.items()}
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        if self.zero_stage:  # made anew for the shards
            self.optimiser.state.clear()
        self.model = self.started = self._start(model, self.optimiser)
        self.started.named_modules = model.named_modules
        self.started.state_dict = model.state_dict
        if self.zero_stage:
            self._fill(blank, shapes)
        if masters:
            self._put_parameters(masters.items())
        return self.model

    def _start(self, model: nn.Module, optimiser: Optimizer) -> Any:
        """DeepSpeed's own engine."""
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # it would be compiled, for nothing that we use
        )
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings(
            "ignore", message=".*is deprecated", category=FutureWarning, module="torch.distributed"
        )
        return deepspeed.initialize(
            model=model, optimizer=optimiser, config=self._config(), dist_init_required=False
        )[0]

    def _config(self) -> dict[str, Any]:
        placement = {"device": "cpu", "pin_memory": True}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # it counts samples with it, nothing else
            "gradient_accumulation_steps": 1,  # the last micro-batch is announced
            "steps_per_print": 10**9,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": False,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_prefetch_bucket_size": BUCKET,
                "stage3_param_persistence_threshold": KEPT,
                **dict.fromkeys(OFFLOADED[self.offload], placement),
            },
        }
        if self.precision == "bfloat16":
            config |= {
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
            }
        return config

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """See Engine.backward. From stage 2 on every micro-batch is summed over the ranks at
        once."""
        self.started.set_gradient_accumulation_boundary(last)
        self.started.backward(loss * self.mesh.world.size, scale_wrt_gas=False)

    def clip_unread(self, max_norm: float | None = None) -> Tensor:
        """See Engine.clip_unread. DeepSpeed scales during its step, by the same factor, and has
        read the norm by then."""
        if not self.zero_stage:
            return clip_gradients(list(self.parameters.values()), max_norm, self.mesh.device)
        sharded = self.started.optimizer
        sharded.clip_grad = max_norm or 0.0
        if self.zero_stage == 3:
            norm = combine_grad_norm_groups(sharded._get_norm_groups())
        elif self.keeps_sums:
            norm = get_global_norm_of_tensors(sharded.get_grads_for_norm()[0])
        else:
            norm = sharded.scaled_global_norm()
        # DeepSpeed says -1 of a norm that is not finite.
        norm = float(norm) if norm >= 0 else float("nan")
        return torch.tensor(norm, dtype=torch.float64, device=self.mesh.device)

    def step(self, learning_rate: float) -> None:
        """See Engine.step."""
        for group in self.started.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        self.started.step()

    def skip(self) -> None:
        """See Engine.skip. DeepSpeed leaves a step out where a gradient overflows; it is told that
        one did."""
        sharded = self.started.optimizer
        if not self.zero_stage or self.keeps_sums:
            (sharded if self.zero_stage else self.started).zero_grad()
            return
        told: dict[str, Any] = {"check_grad_overflow": True, "has_overflow": lambda *_: True}
        if self.zero_stage == 3:
            told = {"_get_norm_groups": lambda: [torch.tensor(-1.0)]}
        own = {name: value for name, value in vars(sharded).items() if name in told}
        vars(sharded).update(told)
        try:
            self.started.step()
        finally:
            for name in told:
                del vars(sharded)[name]
            vars(sharded).update(own)

    def state(self) -> dict[str, dict[str, Tensor]]:
        """See Engine.state. Under ZeRO 1 to 3 copies: each tensor is gathered, and each rank keeps
        a part of it.

        Memory: while it lives, (parameters and moments) / ranks on each device, and the largest
            tensor once whole.
        """
        if not self.zero_stage:
            return super().state()
        model = {
            name: value
            for name, value in self.plain.state_dict().items()
            if name not in self.aliases
        }  # buffers
        parts = {
            name: self._part(self._gathered(parameter))
            for name, parameter in self.parameters.items()
        }
        model |= {name: parts[first] for name, first in self.aliases.items()}
        moments = {}
        for name, flat in self._shards().items():
            for key, value in self.optimiser.state[flat].items():
                alike = value.shape == flat.shape
                whole = safe_get_full_optimizer_state(self.parameters[name], key) if alike else None
                moments[f"{name}.{key}"] = (
                    self._part(cast(Tensor, whole)) if alike else value.clone()
                )
        return {"model": model, "optimizer": moments}

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """See Engine.load. Under ZeRO 1 to 3 parameters that share a shard must have taken equally
        many steps."""
        if not self.zero_stage:
            return super().load(state)
        same(self.state(), state)
        self._put_parameters((name, state["model"][name]) for name in self.parameters)
        for name, flat in self._shards().items():
            for key, value in self.optimiser.state[flat].items():
                given = _whole(state["optimizer"][f"{name}.{key}"])
                if value.shape == flat.shape:
                    self._set(self.parameters[name], given, key)
                else:
                    value.copy_(given)
        for name, buffer in self.plain.state_dict().items():
            if name not in self.aliases:
                buffer.copy_(_whole(state["model"][name]))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """See Engine.load_weights."""
        if not self.zero_stage:
            return super().load_weights(weights)
        self._put_parameters(weights)

    def _shards(self) -> dict[str, Tensor]:
        """By name of a trained parameter, the flat float32 shard of it and others that this rank
        updates."""
        sharded = self.started.optimizer
        if self.zero_stage == 3:
            groups = zip(sharded.fp16_groups, sharded.fp32_partitioned_groups_flat)
        elif self.keeps_sums:
            groups = zip(sharded.bf16_groups, sharded.fp32_groups_flat_partition)
        else:
            groups = zip(sharded.bit16_groups, sharded.single_partition_of_fp32_groups)
        flats = {id(parameter): flat for group, flat in groups for parameter in group}
        return {name: flats[id(p)] for name, p in self.parameters.items() if id(p) in flats}

    def _fill(
        self, blank: Mapping[int, Mapping[str, Tensor]], shapes: Mapping[str, torch.Size]
    ) -> None:
        """Give every shard the state before the first step that its parameters had."""
        for name, flat in self._shards().items():
            if flat not in self.optimiser.state:
                self.optimiser.state[flat] = {
                    key: torch.zeros_like(flat) if value.shape == shapes[name] else value
                    for key, value in blank[id(self.parameters[name])].items()
                }
        if self.zero_stage < 3:
            self.started.optimizer._lazy_init_hp_params_optimizer_state()

    def _gathered(self, parameter: nn.Parameter) -> Tensor:
        """The whole of it, in float32 where it is trained."""
        if parameter.requires_grad:
            return cast(Tensor, safe_get_full_fp32_param(parameter))
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.zero_stage == 3):
            return parameter.detach().clone()

    def _part(self, tensor: Tensor) -> Tensor:
        """[N, ...] -> this rank's share of the rows, as a DTensor."""
        if not tensor.ndim or self.mesh.device_mesh is None:
            return tensor
        return distribute_tensor(
            tensor, self.mesh.device_mesh, [Shard(0)], src_data_rank=None
        ).clone()

    @torch.no_grad()
    def _put_parameters(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Set the masters and what is computed with, or a buffer; a value is whole and equal on all
        ranks, or a DTensor."""
        for name, given in values:
            value = _whole(given).to(self.mesh.device)
            parameter = self.parameters.get(name)
            if parameter is None:
                self.plain.state_dict()[name].copy_(value)
                continue
            with deepspeed.zero.GatheredParameters(
                [parameter], modifier_rank=0, enabled=self.zero_stage == 3
            ):
                parameter.data.copy_(value)
            if parameter.requires_grad:
                self._set(parameter, value)
        if self.zero_stage < 3:
            self.started.optimizer.update_lp_params()

    def _set(self, parameter: Any, value: Tensor, key: str | None = None) -> None:
        """Set the master, or the moment `key`, of a parameter on this rank, from the whole."""
        value = value.to(self.mesh.device)
        if self.zero_stage < 3:
            parameter.set_full_hp_param(value, key)
            return
        size = (
            parameter.ds_tensor.numel()
        )  # DeepSpeed's own cutting fails where the ranks do not divide the elements
        start = min(size * self.mesh.world.rank, value.numel())
        mine = value.flatten()[start : start + size]
        mine = torch.nn.functional.pad(mine, (0, size - mine.numel()))
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor, or all of a DTensor; all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
