"""Adapters (models/lora.py) in the format of peft: written from a checkpoint, read at the start.

    FOLDER/adapter_config.json          rank, alpha and the names of the layers
    FOLDER/adapter_model.safetensors    base_model.model.NAME.lora_A.weight [r, in], lora_B [out, r]

Names are those that our own model has for its layers; peft reads them over that model.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from models.cost.flops import CostTrace, trace_cost
from models.cost.parameters import meta_batch, meta_twin
from models.lora import LEAVES, adapters
from trainer.config.finding import Finding
from trainer.config.schema import Config
from trainer.errors import BAD_RUN, UserError
from trainer.export import read_model
from trainer.files.limited_reader import json_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
WRITTEN = "name a folder that peft or scripts.export format=peft wrote"
PREFIX = "base_model.model."
# Settings of peft under which its layer computes something else than ours.
PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_rslora": False,
    "use_dora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}


def export_adapter(source: Path, output: Path, trust: bool = False) -> int:
    """Writes the adapters of a checkpoint to a folder as peft does, and returns its step.

    Args:
        source, trust: see trainer.export.export.
        output: a folder, made where there is none.

    Raises:
        UserError: the run has no adapters, or the folder holds some already.
    """
    if taken := [name for name in (WEIGHTS, CONFIG) if os.path.lexists(output / name)]:
        raise UserError(f"{output} holds {' and '.join(taken)} already; name another folder")
    saved = read_model(source, trust)
    names = [name for name, _ in adapters(saved.model)]
    if not names:
        raise UserError(f"{source} has no adapters (lora.rank=0); leave format=peft out")
    about = {
        **PLAIN,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "lora_alpha": saved.config.lora.alpha,
        "lora_dropout": 0.0,
        "r": saved.config.lora.rank,
        "target_modules": names,
        "task_type": None,
    }
    tensors: dict[str, Tensor] = {}
    for name in names:
        for leaf in LEAVES:
            tensors[f"{PREFIX}{name}.{leaf}.weight"] = saved.tensors[f"{name}.{leaf}"].contiguous()
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / WEIGHTS, metadata={"format": "pt"})
    (output / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return saved.step


def read_adapter(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of adapters by the names that the model has for them.

    Raises:
        UserError: they cannot be read.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            for key in sorted(file.keys()):
                yield _own_name(key), file.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise UserError(_unreadable(folder, error), BAD_RUN) from error


def check_adapters(config: Config, model: nn.Module) -> Iterator[Finding | str]:
    """Checks lora.*: every chosen layer is called as one, and lora.adapter= fits.

    Args:
        model: of the config, on the meta device.
    """
    lora = config.lora
    if not lora.rank:
        if lora.adapter is not None:
            yield Finding(
                "lora.adapter",
                lora.adapter,
                "there are no adapters to put it into, because lora.rank=0",
                "set lora.rank, lora.alpha and lora.targets as it has them",
            )
        return
    if unused := _never_called(model):
        yield Finding(
            "lora.targets",
            lora.targets,
            f"the model reads the weight of {', '.join(unused[:6])} without calling the layer, so"
            " an adapter would have no effect there",
            "choose other layers",
        )
    if lora.adapter is not None:
        yield from _check_fit(config, model, Path(lora.adapter))


def _never_called(model: nn.Module) -> list[str]:
    """Returns the layers with adapters that a training pass does not call."""
    twin = meta_twin(model, torch.float32)
    trace_cost(twin, CostTrace())
    called: set[str] = set()
    for name, layer in adapters(twin):
        layer.register_forward_hook(lambda *call, name=name: called.add(name))
    batch = meta_batch(twin, 2)
    with torch.no_grad():
        # A pass with targets, because a head is called as a layer only without them.
        twin(batch._replace(targets=torch.zeros_like(batch.tokens)))
    return [name for name, _ in adapters(model) if name not in called]


def _check_fit(config: Config, model: nn.Module, folder: Path) -> Iterator[Finding]:
    """Yields why the adapters in a folder are not those of the model."""

    def finding(fact: str, remedy: str) -> Finding:
        return Finding("lora.adapter", str(folder), fact, remedy)

    if not (folder / CONFIG).is_file():
        yield finding(f"there is no {folder / CONFIG}", WRITTEN)
        return
    try:
        about = json_object(folder / CONFIG)
        shapes = {name: list(tensor.shape) for name, tensor in read_adapter(folder)}
    except (UserError, ValueError, OSError) as error:
        text = str(error).removeprefix(f"lora.adapter={folder}: ")
        yield finding(text, WRITTEN)
        return
    if differing := _not_plain(about):
        yield finding(
            f"it has {differing}, which our adapters have not", "train it without that setting"
        )
        return
    for key, own, theirs in (
        ("lora.rank", config.lora.rank, about.get("r")),
        ("lora.alpha", config.lora.alpha, about.get("lora_alpha")),
    ):
        if own != theirs:
            yield finding(f"its {key} is {theirs}, here {own}", f"use {key}={theirs}")
            return
    wanted = {
        f"{name}.{leaf}": list(getattr(layer, leaf).shape)
        for name, layer in adapters(model)
        for leaf in LEAVES
    }
    differing_names = sorted(
        name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)
    )
    if differing_names:
        name = differing_names[0]
        yield finding(
            f"{len(differing_names)} tensors do not fit, {name} is"
            f" {shapes.get(name, 'absent')} there and {wanted.get(name, 'absent')} here",
            "set lora.targets to the layers that it has",
        )


def _not_plain(about: dict[str, Any]) -> str | None:
    """Returns a setting of peft that changes what its layer computes; None where there is none."""
    for key, value in PLAIN.items():
        if about.get(key, value) not in (value, None):
            return f"{key}={about[key]}"
    return None


def _own_name(key: str) -> str:
    """Returns the name of a parameter of ours for a key of peft's file."""
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _unreadable(folder: Path, error: Exception) -> str:
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"lora.adapter={folder}: {WEIGHTS} cannot be read ({first})"
